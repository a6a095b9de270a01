# What Horovod 0.28.1 needs to compile against today's PyTorch and TensorFlow, without a patch.

# Horovod asks for C++14 (PyTorch) and C++17 (TensorFlow); the headers of both need C++20 by now.
# A target property decides what Horovod asks for, these variables decide which flag answers it.
set(CMAKE_CXX14_STANDARD_COMPILE_OPTION "-std=c++20")
set(CMAKE_CXX17_STANDARD_COMPILE_OPTION "-std=c++20")

# Horovod's operations inside XLA, off by default at run time, are written against headers that
# TensorFlow no longer ships. Called a header, the file stays in the target and is not compiled.
cmake_language(DEFER CALL set_source_files_properties
    "${CMAKE_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc"
    DIRECTORY "${CMAKE_SOURCE_DIR}/horovod/tensorflow"
    PROPERTIES HEADER_FILE_ONLY ON)
