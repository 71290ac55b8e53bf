# compile_tensorrt(TARGET FLAVOUR INCLUDE...): the backend's part that is compiled against TensorRT's header, as objects.
# FLAVOUR is tensorrt or tensorrt_rtx.
function(compile_tensorrt target flavour)
  add_library(${target} OBJECT "${PROJECT_SOURCE_DIR}/src/tensorrt/engine.cpp")
  target_include_directories(${target} PRIVATE "${PROJECT_SOURCE_DIR}/src")
  target_include_directories(${target} SYSTEM PRIVATE ${ARGN})
  target_compile_definitions(${target} PRIVATE
    nvinfer1=nvinfer1_${flavour} GLANCE_CREATE_RUNTIME=glance_create_${flavour}_runtime)
  target_compile_options(${target} PRIVATE $<TARGET_PROPERTY:glance_objects,INTERFACE_COMPILE_OPTIONS>)
endfunction()

# add_tensorrt(ROOT) adds the backend for the installation of TensorRT or TensorRT-RTX at ROOT to the library.
function(add_tensorrt root)
  find_path(include NvInferRuntime.h PATHS "${root}" PATH_SUFFIXES include NO_DEFAULT_PATH NO_CACHE REQUIRED)
  find_path(CUDA_INCLUDE_DIR cuda_runtime_api.h
    HINTS "${CUDAToolkit_ROOT}" "$ENV{CUDA_PATH}" /usr/local/cuda PATH_SUFFIXES include REQUIRED)
  file(STRINGS "${include}/NvInferVersion.h" rtx REGEX "define +TRT_MAJOR_RTX")
  set(flavour tensorrt)
  if(rtx)
    set(flavour tensorrt_rtx)
  endif()
  compile_tensorrt(glance_${flavour} ${flavour} "${include}" "${CUDA_INCLUDE_DIR}")
  target_sources(glance_objects INTERFACE $<TARGET_OBJECTS:glance_${flavour}>)
  string(TOUPPER ${flavour} name)
  target_compile_definitions(glance_objects PRIVATE GLANCE_WITH_${name})
endfunction()
