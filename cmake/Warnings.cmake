# fsattn_warnings(<target>): the warnings that host code must be free of; errors with FSATTN_WERROR.
function(fsattn_warnings TARGET)
  set(flags -Wall -Wextra -Wconversion)
  if(FSATTN_WERROR)
    list(APPEND flags -Werror)
  endif()
  target_compile_options(${TARGET} PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:${flags}>")
endfunction()
