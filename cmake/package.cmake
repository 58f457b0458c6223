# What is installed, and the Debian packages of it: keepset (daemon, command, unit, wire contract),
# libkeepset1 and libkeepset-dev (the C ABI). `ninja man` first; cpack -G DEB then.
set(CMAKE_INSTALL_DEFAULT_COMPONENT_NAME keepset)
set(KEEPSET_LIBDIR lib/${CMAKE_LIBRARY_ARCHITECTURE})
set(deploy ${PROJECT_SOURCE_DIR}/deploy)
set(generated ${PROJECT_BINARY_DIR}/package)

# The release's date, so that the same source gives the same files.
file(STRINGS ${deploy}/debian/changelog signature REGEX "^ -- ")
string(REGEX REPLACE "^.*>  " "" KEEPSET_RELEASE_DATE "${signature}")

find_package(Python3 REQUIRED COMPONENTS Interpreter)
add_custom_target(man
  COMMAND ${Python3_EXECUTABLE} ${PROJECT_SOURCE_DIR}/tools/man_page keepset 1
    --program $<TARGET_FILE:keepset> --date "${KEEPSET_RELEASE_DATE}" --out ${generated}/keepset.1
  COMMAND ${Python3_EXECUTABLE} ${PROJECT_SOURCE_DIR}/tools/man_page keepsetd 8
    --program $<TARGET_FILE:keepsetd> --date "${KEEPSET_RELEASE_DATE}" --out ${generated}/keepsetd.8
  DEPENDS keepset keepsetd VERBATIM)

foreach(target keepset keepsetd keepset_shared)
  target_link_options(${target} PRIVATE -Wl,-z,relro,-z,now)
endforeach()

install(TARGETS keepset keepsetd RUNTIME DESTINATION bin COMPONENT keepset)
install(FILES ${deploy}/systemd/keepsetd.service DESTINATION /lib/systemd/system COMPONENT keepset)
install(FILES ${deploy}/keepsetd.conf DESTINATION /etc/keepset COMPONENT keepset)
install(DIRECTORY ${PROJECT_SOURCE_DIR}/proto/keepset DESTINATION share/keepset/proto
  COMPONENT keepset FILES_MATCHING PATTERN "*.proto")

install(TARGETS keepset_shared LIBRARY DESTINATION ${KEEPSET_LIBDIR}
  COMPONENT library NAMELINK_COMPONENT development)
install(FILES ${PROJECT_SOURCE_DIR}/engine/keepset.h DESTINATION include COMPONENT development)
configure_file(${deploy}/debian/keepset.pc.in ${generated}/keepset.pc @ONLY)
install(FILES ${generated}/keepset.pc DESTINATION ${KEEPSET_LIBDIR}/pkgconfig
  COMPONENT development)

# Debian wants them compressed. Without `ninja man` there are no pages to install.
install(CODE "
  file(GLOB pages ${generated}/keepset.1 ${generated}/keepsetd.8)
  foreach(page \${pages})
    string(REGEX REPLACE \"^.*[.]\" \"\" section \${page})
    get_filename_component(name \${page} NAME)
    set(folder \"\$ENV{DESTDIR}\${CMAKE_INSTALL_PREFIX}/share/man/man\${section}\")
    file(MAKE_DIRECTORY \${folder})
    execute_process(COMMAND gzip -9nc \${page} OUTPUT_FILE \${folder}/\${name}.gz
      COMMAND_ERROR_IS_FATAL ANY)
  endforeach()" COMPONENT keepset)
foreach(pair keepset:keepset library:libkeepset1 development:libkeepset-dev)
  string(REPLACE ":" ";" pair ${pair})
  list(GET pair 0 component)
  list(GET pair 1 package)
  install(FILES ${deploy}/debian/copyright DESTINATION share/doc/${package}
    COMPONENT ${component})
  install(CODE "
    set(folder \"\$ENV{DESTDIR}\${CMAKE_INSTALL_PREFIX}/share/doc/${package}\")
    execute_process(COMMAND gzip -9nc ${deploy}/debian/changelog
      OUTPUT_FILE \${folder}/changelog.gz COMMAND_ERROR_IS_FATAL ANY)" COMPONENT ${component})
endforeach()

set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_NAME keepset)
set(CPACK_PACKAGE_VENDOR Keepset)
set(CPACK_PACKAGE_CONTACT "Keepset maintainers <maintainers@users.noreply.keepset.example>")
set(CPACK_PACKAGE_DIRECTORY ${PROJECT_BINARY_DIR}/packages)
set(CPACK_PACKAGING_INSTALL_PREFIX /usr)
set(CPACK_COMPONENTS_ALL keepset library development)
set(CPACK_COMPONENTS_GROUPING IGNORE)
set(CPACK_STRIP_FILES ON)
set(CPACK_INSTALL_DEFAULT_DIRECTORY_PERMISSIONS
  OWNER_READ OWNER_WRITE OWNER_EXECUTE GROUP_READ GROUP_EXECUTE WORLD_READ WORLD_EXECUTE)

set(CPACK_DEB_COMPONENT_INSTALL ON)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_COMPRESSION_TYPE xz)
set(CPACK_DEBIAN_PACKAGE_CONTROL_STRICT_PERMISSION ON)
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
set(CPACK_DEBIAN_PACKAGE_GENERATE_SHLIBS ON)

set(CPACK_DEBIAN_KEEPSET_PACKAGE_NAME keepset)
set(CPACK_DEBIAN_KEEPSET_PACKAGE_SECTION net)
set(CPACK_DEBIAN_KEEPSET_PACKAGE_DEPENDS adduser)
set(CPACK_DEBIAN_KEEPSET_DESCRIPTION "KV-cache retention for inference workers, as a service
An inference worker hands over what it saw at the end of prefill and where its
keys and values are; keepsetd answers which positions to keep, per layer, and
moves the kept rows when asked. It serves gRPC on a Unix socket, reloads its
tables while serving and is watched by Prometheus.
.
The keepset command compresses captures, inspects and compiles tables, and
asks a server what it is.")
file(WRITE ${generated}/conffiles "/etc/keepset/keepsetd.conf\n")
set(CPACK_DEBIAN_KEEPSET_PACKAGE_CONTROL_EXTRA ${generated}/conffiles
  ${generated}/postinst ${generated}/prerm ${generated}/postrm)
foreach(script postinst prerm postrm)
  configure_file(${deploy}/debian/keepset.${script} ${generated}/${script} COPYONLY)
endforeach()

set(CPACK_DEBIAN_LIBRARY_PACKAGE_NAME libkeepset1)
set(CPACK_DEBIAN_LIBRARY_PACKAGE_SECTION libs)
# CPack adds an ldconfig call of its own beside it, which does no harm.
file(WRITE ${generated}/triggers "activate-noawait ldconfig\n")
set(CPACK_DEBIAN_LIBRARY_PACKAGE_CONTROL_EXTRA ${generated}/triggers)
set(CPACK_DEBIAN_LIBRARY_DESCRIPTION "KV-cache retention in process
The C ABI of Keepset: which positions of a prompt's KV cache to keep, decided
in the worker's own process.")

set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_NAME libkeepset-dev)
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_SECTION libdevel)
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_DEPENDS "libkeepset1 (= ${PROJECT_VERSION})")
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_SHLIBDEPS OFF)
set(CPACK_DEBIAN_DEVELOPMENT_DESCRIPTION "KV-cache retention in process: development files
The header, the link and the pkg-config file of libkeepset, for programs that
decide in their own process which positions of a KV cache to keep.")
include(CPack)
