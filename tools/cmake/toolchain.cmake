# Handed to Horovod's build through the environment variable CMAKE_TOOLCHAIN_FILE.
#
# Horovod 0.28.1 is built exactly as released. CMake reads this file first, and it asks CMake to
# read adjustments.cmake right after Horovod's own project() command: late enough for the compiler
# to be known, early enough to change how it is called.
set(CMAKE_PROJECT_horovod_INCLUDE "${CMAKE_CURRENT_LIST_DIR}/adjustments.cmake")
