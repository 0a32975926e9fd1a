# Read by CMake when llama.cpp's own project begins: its Python package asks for a library of the command-line programs
# (half of what is compiled) that Python never loads.
set(LLAMA_BUILD_COMMON OFF)

# GCC before 11.5, 12.4 and 13.3 throws away the table that AMX tiles are configured by (its bug 114098), and products in 8 and 4 bits
# of more than a few tokens then end the process: such a compiler is not to use AMX.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  string(REGEX MATCH "^[0-9]+" major "${CMAKE_CXX_COMPILER_VERSION}")
  set(mended_11 11.5)
  set(mended_12 12.4)
  set(mended_13 13.3)
  if(major EQUAL 11 OR major EQUAL 12 OR major EQUAL 13)
    if(CMAKE_CXX_COMPILER_VERSION VERSION_LESS "${mended_${major}}")
      add_compile_options(-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
    endif()
  endif()
endif()
