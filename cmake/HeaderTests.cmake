# Every header compiles alone: one generated translation unit a header, in one object library that the
# test `headers` builds. Headers that need the CUDA runtime are left to the CUDA build.
file(GLOB_RECURSE headers CONFIGURE_DEPENDS RELATIVE ${PROJECT_SOURCE_DIR}
     ${PROJECT_SOURCE_DIR}/include/*.h ${PROJECT_SOURCE_DIR}/src/*.h
     ${PROJECT_SOURCE_DIR}/tests/support/*.h)
list(FILTER headers EXCLUDE REGEX "src/cuda/")
# Bodies that a file of one instruction set includes after it has chosen its vector width.
list(FILTER headers EXCLUDE REGEX "src/cpu/(exp|tile_kernels|row_kernels_isa).h$")
if(NOT FSATTN_WITH_CUDA)
  list(REMOVE_ITEM headers src/base/cuda_check.h)
endif()

set(header_tests)
foreach(header IN LISTS headers)
  string(REGEX REPLACE "^(include|src|tests)/" "" HEADER ${header})
  string(REPLACE "/" "_" name ${header})
  set(source ${PROJECT_BINARY_DIR}/header_tests/${name}.cpp)
  # Twice, so that a missing include guard fails too.
  file(CONFIGURE OUTPUT ${source} CONTENT "#include \"@HEADER@\"\n#include \"@HEADER@\"\n" @ONLY)
  list(APPEND header_tests ${source})
endforeach()

add_library(fsattn_header_tests OBJECT EXCLUDE_FROM_ALL ${header_tests})
target_include_directories(fsattn_header_tests PRIVATE ${PROJECT_SOURCE_DIR}/tests)
target_link_libraries(fsattn_header_tests PRIVATE fsattn_build)
target_compile_options(fsattn_header_tests PRIVATE -O0)
fsattn_warnings(fsattn_header_tests)
add_test(NAME headers COMMAND ${CMAKE_COMMAND} --build ${PROJECT_BINARY_DIR}
                              --target fsattn_header_tests)
