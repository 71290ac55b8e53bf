// See ../NvInferRuntime.h
#pragma once
#include "../NvInferRuntime.h"
