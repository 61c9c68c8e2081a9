// Marks functions that a CUDA compiler may also compile for the device.
#ifndef JAX_FUSCO_CORE_MACROS_H_
#define JAX_FUSCO_CORE_MACROS_H_

#if defined(__CUDACC__)
#define JAX_FUSCO_HOST_DEVICE __host__ __device__
#else
#define JAX_FUSCO_HOST_DEVICE
#endif

#endif  // JAX_FUSCO_CORE_MACROS_H_
