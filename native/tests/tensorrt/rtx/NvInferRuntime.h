// See ../NvInferRuntime.h
#pragma once
#define TRT_MAJOR_RTX 1
#include "../NvInferRuntime.h"
