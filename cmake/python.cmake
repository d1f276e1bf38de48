# The two shared libraries of the Python package: the operators, and the pybind11 module with facts about them.
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 CONFIG REQUIRED)

# One library for every torch >= 2.10: the stable ABI at version 2.10, and libtorch by name, without a path.
add_library(timm_ext MODULE
  csrc/conv3d/conv_square_on_cpu.cpp
  csrc/conv3d/conv_weight_grad_square.cpp
  csrc/conv3d/cpu/conv_pack.cpp
  csrc/conv3d/cpu/depthwise_tiling.cpp
  csrc/conv3d/cpu/winograd_square_layout.cpp
  csrc/conv3d/depthwise_conv3d.cpp
  csrc/conv3d/packed_square.cpp
  csrc/conv3d/pointwise_square.cpp
  csrc/conv3d/small_conv3d.cpp
  csrc/conv3d/strided_conv3d.cpp
  csrc/conv3d/trilinear3d.cpp
  csrc/conv3d/upsampling3d.cpp
  csrc/conv3d/weight_gradient.cpp
  csrc/conv3d/winograd_conv3d.cpp
  csrc/conv3d/winograd_square.cpp
  csrc/fisher/sample_labels.cpp
  csrc/fisher/square_accumulate.cpp
  csrc/library.cpp
  csrc/memory/cpu/memory_pool.cpp
  csrc/memory/new_tensor.cpp
  csrc/merge/cpu/stitch.cpp
  csrc/merge/fused_merge.cpp
  csrc/merge/log_weights.cpp
  csrc/norm/channels_last_norm.cpp
  csrc/norm/norm.cpp)
set(torch_library_dir ${TIMM_EXT_TORCH_DIR}/lib)
target_include_directories(timm_ext SYSTEM PRIVATE ${TIMM_EXT_TORCH_DIR}/include)
target_compile_definitions(timm_ext PRIVATE TORCH_TARGET_VERSION=0x020a000000000000)
target_link_libraries(timm_ext PRIVATE timm_ext_options ${isa_libraries} timm_ext_isa)
target_link_options(timm_ext PRIVATE -Wl,--no-as-needed)
target_link_libraries(timm_ext PRIVATE ${torch_library_dir}/libtorch.so ${torch_library_dir}/libtorch_cpu.so)
# With a dot in its name it is no Python module to those who list the package's.
set_target_properties(timm_ext PROPERTIES SKIP_BUILD_RPATH ON SUFFIX .torch.so)

if(timm_ext_cuda)
  target_sources(timm_ext PRIVATE ${timm_ext_cuda_sources})
  target_compile_definitions(timm_ext PRIVATE TIMM_EXT_CUDA)
endif()

# NO_EXTRAS: pybind11 would call strip by a shell, without quotes around the path.
pybind11_add_module(_host NO_EXTRAS csrc/host.cpp)
target_compile_definitions(_host PRIVATE
  TIMM_EXT_VERSION="${TIMM_EXT_VERSION}"
  TIMM_EXT_TORCH_VERSION="${TIMM_EXT_TORCH_VERSION}"
  TIMM_EXT_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
  TIMM_EXT_CUDA_BUILT=$<BOOL:${timm_ext_cuda}>
  TIMM_EXT_CUDA_VERSION="${timm_ext_cuda_version}"
  TIMM_EXT_CUDA_ARCHITECTURES="${timm_ext_cuda_architectures}")
target_link_libraries(_host PRIVATE timm_ext_options timm_ext_isa)

install(TARGETS timm_ext _host LIBRARY DESTINATION .)
