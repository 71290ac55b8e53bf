# Sets ONNXRUNTIME_INCLUDE_DIR, where onnxruntime_c_api.h is, and ONNXRUNTIME_LIBRARY, what to load at run time unless
# something else is named: empty but for an installation that ONNXRUNTIME_ROOT names and that has the library.
set(headers onnxruntime_c_api.h)
set(folders include include/onnxruntime include/onnxruntime/core/session)
set(ONNXRUNTIME_LIBRARY "")
if(ONNXRUNTIME_ROOT)
  find_path(ONNXRUNTIME_INCLUDE_DIR ${headers} PATHS "${ONNXRUNTIME_ROOT}" PATH_SUFFIXES ${folders} NO_DEFAULT_PATH REQUIRED)
  file(GLOB libraries "${ONNXRUNTIME_ROOT}/lib/libonnxruntime.so.?" "${ONNXRUNTIME_ROOT}/lib/libonnxruntime.dylib")
  if(libraries)
    list(GET libraries 0 ONNXRUNTIME_LIBRARY)
  endif()
else()
  find_path(ONNXRUNTIME_INCLUDE_DIR ${headers} PATHS "${PROJECT_BINARY_DIR}" PATH_SUFFIXES onnxruntime ${folders})
  if(NOT ONNXRUNTIME_INCLUDE_DIR)
    execute_process(
      COMMAND "${PROJECT_SOURCE_DIR}/scripts/get_onnxruntime_headers.sh" "${PROJECT_BINARY_DIR}/onnxruntime"
      RESULT_VARIABLE failed)
    if(failed)
      message(FATAL_ERROR "ONNX Runtime's headers could not be had; give -DONNXRUNTIME_ROOT=FOLDER")
    endif()
    find_path(ONNXRUNTIME_INCLUDE_DIR ${headers} PATHS "${PROJECT_BINARY_DIR}/onnxruntime" REQUIRED)
  endif()
endif()
