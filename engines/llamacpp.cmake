# Read by CMake when llama.cpp's own project begins: its Python package asks for a library of the command-line programs
# (half of what is compiled) that Python never loads.
set(LLAMA_BUILD_COMMON OFF)
