# Links tsan_absl_mutex.cc into every executable of a ThreadSanitizer build.
add_library(keepset_tsan_absl_mutex OBJECT ${CMAKE_CURRENT_LIST_DIR}/tsan_absl_mutex.cc)
target_link_libraries(keepset_tsan_absl_mutex PUBLIC absl::synchronization ${CMAKE_DL_LIBS})
link_libraries($<$<STREQUAL:$<TARGET_PROPERTY:TYPE>,EXECUTABLE>:$<TARGET_OBJECTS:keepset_tsan_absl_mutex>>
  $<$<STREQUAL:$<TARGET_PROPERTY:TYPE>,EXECUTABLE>:absl::synchronization>)
