// For the C functions through which the tests call an operator's launchers.
#pragma once

#include <exception>
#include <string>

// Runs f and returns nullptr, or what went wrong: a text that lives until the next call.
template <class F>
const char* emulated(const F& f) {
  static std::string error;
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}
