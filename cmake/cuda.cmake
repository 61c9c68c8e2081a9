# The target jax_fusco_cuda, where a CUDA compiler is found (or must be).
find_program(JAX_FUSCO_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin /usr/local/cuda/bin)
if(JAX_FUSCO_NVCC AND NOT CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_COMPILER ${JAX_FUSCO_NVCC})
endif()
if(NOT CMAKE_CUDA_COMPILER)
  if(JAX_FUSCO_CUDA STREQUAL "ON")
    message(FATAL_ERROR "JAX_FUSCO_CUDA=ON needs nvcc: put it on PATH, or set CUDA_HOME.")
  endif()
  message(STATUS "jax_fusco: no nvcc, built without the engine of NVIDIA GPUs")
  return()
endif()
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100)
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

file(GLOB CUDA_SOURCES CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/xla_ffi/engine/cuda/*.cu
     ${CMAKE_CURRENT_SOURCE_DIR}/xla_ffi/engine/cuda/*.cc)
add_library(jax_fusco_cuda STATIC ${CUDA_SOURCES})
set_target_properties(jax_fusco_cuda PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON
                      CUDA_RUNTIME_LIBRARY Static)
# Sums must not be contracted into other fused operations than those written. ptxas reports the
# registers and spills of each kernel.
target_compile_options(jax_fusco_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:--fmad=false;-Xptxas=-v;-Xcompiler=-Wall,-Wextra>)
if(JAX_FUSCO_WERROR)
  target_compile_options(jax_fusco_cuda PUBLIC $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
endif()
target_link_libraries(jax_fusco_cuda PUBLIC jax_fusco_core PRIVATE CUDA::cudart_static ${CMAKE_DL_LIBS})
