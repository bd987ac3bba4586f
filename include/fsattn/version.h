// The one place that holds the version; CMake and the Python package read it from here.
#pragma once

#define FSATTN_VERSION_MAJOR 0
#define FSATTN_VERSION_MINOR 1
#define FSATTN_VERSION_PATCH 0
#define FSATTN_VERSION "0.1.0"
