# One room, one target. keepset_library(NAME SRCS ... DEPS ... [PRIVATE_DEPS ...])
#
# DEPS are visible to whoever links the room; PRIVATE_DEPS stay inside (generated proto code, Highway).
function(keepset_library NAME)
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS;PRIVATE_DEPS" ${ARGN})
  add_library(keepset_${NAME} STATIC ${ARG_SRCS})
  target_include_directories(keepset_${NAME} PUBLIC ${PROJECT_SOURCE_DIR})
  target_link_libraries(keepset_${NAME} PUBLIC ${ARG_DEPS} PRIVATE ${ARG_PRIVATE_DEPS})
endfunction()

# One test binary per room. keepset_test(NAME SRCS ... DEPS ... [LABELS ...])
function(keepset_test NAME)
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS;LABELS" ${ARGN})
  add_executable(${NAME} ${ARG_SRCS})
  target_link_libraries(${NAME} PRIVATE ${ARG_DEPS} GTest::gmock GTest::gtest_main)
  target_compile_definitions(${NAME} PRIVATE KEEPSET_SOURCE_DIR="${PROJECT_SOURCE_DIR}")
  if(NOT ARG_LABELS)
    set(ARG_LABELS unit)
  endif()
  if(KEEPSET_SANITIZE)
    # tools/check runs programs whole, which is several times faster than a process per test, and
    # the tests of those that fail one by one. Resident memory is the sanitizer's, not ours.
    add_test(NAME whole.${NAME}
      COMMAND ${NAME} --gtest_brief=1 --gtest_filter=-*.HoldsNoMemoryBeforeItIsWritten)
    set_tests_properties(whole.${NAME} PROPERTIES TIMEOUT 900)
    set(ARG_LABELS of.${NAME})
  endif()
  gtest_discover_tests(${NAME} DISCOVERY_TIMEOUT 60 PROPERTIES LABELS ${ARG_LABELS} TIMEOUT 300)
endfunction()
