# The CUDA kernels, compiled for GPUs: the target tutelage_cuda, if TUTELAGE_CUDA says so. No driver is needed to build or to link
# it. Sets TUTELAGE_CUDA_BUILT, and TUTELAGE_CUDA_OBJECTS, what a module links.
#
# nvcc is called by hand: CMake 3.21 … 3.25, which Debian has, do not know the dialects of nvcc 13.
set(TUTELAGE_CUDA_BUILT OFF)
set(TUTELAGE_CUDA_OBJECTS "")
if(NOT TUTELAGE_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "TUTELAGE_CUDA is ${TUTELAGE_CUDA}: AUTO, ON or OFF are expected")
endif()
if(NOT TUTELAGE_CUDA STREQUAL "OFF")
  find_program(TUTELAGE_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin /usr/local/cuda/bin)
  find_library(TUTELAGE_CUDA_DRIVER NAMES libcuda.so.1)
  mark_as_advanced(TUTELAGE_NVCC TUTELAGE_CUDA_DRIVER)
  if(TUTELAGE_CUDA STREQUAL "ON" AND NOT TUTELAGE_NVCC)
    message(FATAL_ERROR "TUTELAGE_CUDA is ON and nvcc is not found: put it into PATH or set CUDA_HOME")
  endif()
  if(TUTELAGE_NVCC AND (TUTELAGE_CUDA STREQUAL "ON" OR TUTELAGE_CUDA_DRIVER))
    set(TUTELAGE_CUDA_BUILT ON)
  endif()
endif()

if(TUTELAGE_CUDA_BUILT)
  # A100 and its like (8.6, 8.9 run the same code), H100, and PTX for what comes later
  set(TUTELAGE_CUDA_ARCHITECTURES
    "-gencode=arch=compute_80,code=sm_80;-gencode=arch=compute_90,code=[sm_90,compute_90]" CACHE STRING "nvcc's -gencode options")
  # Nothing is fused behind a kernel's back: see cuda/ptx/math.h. tools/check_cuda.py compiles with the same flags.
  set(cuda_flags -std=c++20 -O3 -fmad=false -Xcompiler=-fPIC,-fvisibility=hidden -I${CMAKE_CURRENT_SOURCE_DIR}
    -I${CMAKE_CURRENT_SOURCE_DIR}/cpp)
  file(GLOB cuda_units CONFIGURE_DEPENDS cuda/units/*.cu)
  list(APPEND cuda_units ${CMAKE_CURRENT_SOURCE_DIR}/cuda/backend.cu)
  foreach(unit IN LISTS cuda_units)
    get_filename_component(name ${unit} NAME_WE)
    set(object ${CMAKE_CURRENT_BINARY_DIR}/cuda/${name}.o)
    add_custom_command(OUTPUT ${object}
      COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_CURRENT_BINARY_DIR}/cuda
      COMMAND ${TUTELAGE_NVCC} ${cuda_flags} ${TUTELAGE_CUDA_ARCHITECTURES} -MD -MF ${object}.d -c ${unit} -o ${object}
      DEPENDS ${unit} DEPFILE ${object}.d VERBATIM COMMENT "nvcc ${name}.cu")
    list(APPEND TUTELAGE_CUDA_OBJECTS ${object})
  endforeach()
  # The runtime, linked statically: the module loads where there is no driver, and looks for one when it is first used. nvcc may
  # be a script, so it is asked where it lives.
  execute_process(COMMAND ${TUTELAGE_NVCC} --dryrun -x cu -c /dev/null ERROR_VARIABLE plan OUTPUT_QUIET)
  string(REGEX MATCH "TOP=([^\n]+)" top "${plan}")
  find_library(TUTELAGE_CUDART NAMES libcudart_static.a REQUIRED
    HINTS ${CMAKE_MATCH_1} PATH_SUFFIXES lib64 lib targets/x86_64-linux/lib targets/sbsa-linux/lib)
  mark_as_advanced(TUTELAGE_CUDART)
  set(TUTELAGE_CUDA_LIBRARIES ${TUTELAGE_CUDART} Threads::Threads ${CMAKE_DL_LIBS} rt)
  add_custom_target(tutelage_cuda DEPENDS ${TUTELAGE_CUDA_OBJECTS})
endif()
