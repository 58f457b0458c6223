# Whether the CUDA backend is built: KEEPSET_HAS_CUDA, for CMake and (as a definition) for .def files.
#
# No program links libcuda or cuBLAS: cudart is static, the rest is resolved at run time, so that one
# binary runs on hosts with and without a device.
set(KEEPSET_HAS_CUDA OFF)
# Whether window kernels "cublas" are in it: the toolkit has cuBLAS' declarations, and KEEPSET_CUBLAS is ON.
set(KEEPSET_HAS_CUBLAS OFF)
if(NOT KEEPSET_CUDA STREQUAL "OFF")
  find_program(KEEPSET_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
  if(KEEPSET_NVCC)
    set(KEEPSET_HAS_CUDA ON)
  elseif(NOT KEEPSET_CUDA STREQUAL "AUTO")
    # Better no build than one that says CUDA and computes on the CPU.
    message(FATAL_ERROR "KEEPSET_CUDA=${KEEPSET_CUDA}: no nvcc found, want a CUDA toolkit in PATH or "
                        "/usr/local/cuda, or preset cpu-only")
  endif()
endif()
if(KEEPSET_HAS_CUDA)
  set(CMAKE_CUDA_COMPILER ${KEEPSET_NVCC})
  # Which machines the code is for is said per file below.
  set(CMAKE_CUDA_ARCHITECTURES OFF)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  enable_language(CUDA)
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
    # CMake 3.25 does not ask every nvcc what it can do.
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  endif()
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  find_package(CUDAToolkit REQUIRED)
  foreach(directory ${CUDAToolkit_INCLUDE_DIRS})
    if(KEEPSET_CUBLAS AND EXISTS ${directory}/cublas_v2.h)
      set(KEEPSET_HAS_CUBLAS ON)
    endif()
  endforeach()

  # One translation to PTX, from which the assembler makes the code of each architecture and which
  # later devices compile themselves.
  execute_process(COMMAND ${KEEPSET_NVCC} --list-gpu-code OUTPUT_VARIABLE KEEPSET_GPU_CODES)
  set(KEEPSET_CUDA_CODES compute_80)
  foreach(code sm_80 sm_86 sm_89 sm_90 sm_100 sm_120)
    if(KEEPSET_GPU_CODES MATCHES "${code}\n")
      list(APPEND KEEPSET_CUDA_CODES ${code})
    endif()
  endforeach()
  list(JOIN KEEPSET_CUDA_CODES "," KEEPSET_CUDA_CODES)
  set(KEEPSET_CUDA_COMMON_OPTIONS
    $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr>
    # A host function in a kernel would only warn, and compile to a trap.
    $<$<COMPILE_LANGUAGE:CUDA>:-Werror=cross-execution-space-call>)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    # Device code of six architectures, at a fifth of its bytes.
    list(APPEND KEEPSET_CUDA_COMMON_OPTIONS $<$<COMPILE_LANGUAGE:CUDA>:--compress-mode=size>)
  endif()
  set(KEEPSET_CUDA_PORTABLE_OPTIONS
    $<$<COMPILE_LANGUAGE:CUDA>:--generate-code=arch=compute_80,code=[${KEEPSET_CUDA_CODES}]>
    ${KEEPSET_CUDA_COMMON_OPTIONS})
  set(KEEPSET_CUDA_HOPPER_OPTIONS
    $<$<COMPILE_LANGUAGE:CUDA>:--generate-code=arch=compute_90a,code=sm_90a>
    ${KEEPSET_CUDA_COMMON_OPTIONS})
  # No kernel spills registers with the assembler that they were written for; another one only warns.
  set(KEEPSET_SPILL_OPTIONS --warn-on-spills)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13.0 AND CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 13.1)
    string(APPEND KEEPSET_SPILL_OPTIONS ",--warning-as-error")
  endif()
  foreach(options KEEPSET_CUDA_PORTABLE_OPTIONS KEEPSET_CUDA_HOPPER_OPTIONS)
    list(APPEND ${options} $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=${KEEPSET_SPILL_OPTIONS}>)
  endforeach()
endif()
message(STATUS "CUDA backend: ${KEEPSET_HAS_CUDA}, with cuBLAS: ${KEEPSET_HAS_CUBLAS}")
