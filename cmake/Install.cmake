# Installs the public headers, the library and a CMake package: find_package(fsattn CONFIG).
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/fsattn)
install(DIRECTORY include/fsattn DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
        FILES_MATCHING PATTERN "*.h")
install(TARGETS fsattn EXPORT fsattn_targets
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
        LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(EXPORT fsattn_targets NAMESPACE fsattn:: DESTINATION ${package_dir})
configure_package_config_file(cmake/fsattn-config.cmake.in
                              ${PROJECT_BINARY_DIR}/fsattn-config.cmake
                              INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/fsattn-config-version.cmake
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/fsattn-config.cmake
              ${PROJECT_BINARY_DIR}/fsattn-config-version.cmake
        DESTINATION ${package_dir})
