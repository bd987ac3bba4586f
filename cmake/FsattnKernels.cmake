# fsattn_add_kernel(<op> <name> <arch>...): compiles src/cuda/<op>/<name>_row.cu.in once for each row
# of the table k<Name>Table, in table order, only for that row's architecture. The generated text
# checks that this list and the table agree, so a mismatch is a compile error. Up to
# FSATTN_ROWS_PER_FILE rows of an architecture share a translation unit: most of the time of one with a
# single row goes into its headers.
#
# A row for arch 80 runs on every GPU from Ampere on: machine code for sm_80 (sm_86 and sm_89 take it)
# and sm_90, and PTX for newer ones. A row for 90a holds Hopper's own instructions and runs there only.
set(FSATTN_CUDA_FLAGS
  -std=c++20  # CMake before 3.25.2 drops CUDA_STANDARD 20 for nvcc without a word
  -lineinfo --expt-relaxed-constexpr
  -Xptxas=--warn-on-spills,--warning-as-error)

function(fsattn_cuda_library ARCH OUT)
  set(target fsattn_cuda_sm${ARCH})
  if(NOT TARGET ${target})
    add_library(${target} OBJECT)
    target_link_libraries(${target} PRIVATE fsattn_build)
    target_compile_options(${target} PRIVATE ${FSATTN_CUDA_FLAGS})
    if(ARCH STREQUAL "90a")
      set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES 90a-real)
    else()
      set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES "80-real;90")
    endif()
    set_property(GLOBAL APPEND PROPERTY FSATTN_CUDA_LIBRARIES ${target})
  endif()
  set(${OUT} ${target} PARENT_SCOPE)
endfunction()

set(FSATTN_ROWS_PER_FILE 4)

function(fsattn_add_kernel OP NAME)
  set(folder ${CMAKE_BINARY_DIR}/generated/${OP})
  list(LENGTH ARGN ROWS)
  set(ROW 0)
  foreach(ARCH IN LISTS ARGN)
    set(row ${NAME}_row${ROW}.cuh)
    configure_file(${CMAKE_CURRENT_SOURCE_DIR}/${OP}/${NAME}_row.cu.in ${folder}/${row} @ONLY)
    # Rows 0 to 3 of an architecture go to its file 0, and so on.
    list(LENGTH includes_${ARCH} count)
    math(EXPR file "${count} / ${FSATTN_ROWS_PER_FILE}")
    list(APPEND includes_${ARCH} ${row})
    string(APPEND text_${ARCH}_${file} "#include \"${row}\"\n")
    math(EXPR ROW "${ROW} + 1")
  endforeach()
  list(REMOVE_DUPLICATES ARGN)
  foreach(ARCH IN LISTS ARGN)
    fsattn_cuda_library(${ARCH} target)
    set(file 0)
    while(DEFINED text_${ARCH}_${file})
      set(source ${folder}/${NAME}_sm${ARCH}_${file}.cu)
      file(CONFIGURE OUTPUT ${source} CONTENT "${text_${ARCH}_${file}}" @ONLY)
      target_sources(${target} PRIVATE ${source})
      math(EXPR file "${file} + 1")
    endwhile()
  endforeach()
endfunction()
