# The CUDA kernels and their launchers: for the library, the host executor's tests and those on a GPU.
set(timm_ext_csrc ${CMAKE_CURRENT_LIST_DIR}/../csrc)
set(timm_ext_cuda_sources
  ${timm_ext_csrc}/conv3d/cuda/conv_square.cu
  ${timm_ext_csrc}/conv3d/cuda/conv_square_tiling.cpp
  ${timm_ext_csrc}/cuda/error.cu
  ${timm_ext_csrc}/fisher/cuda/sample_labels.cu
  ${timm_ext_csrc}/fisher/cuda/square_accumulate.cu
  ${timm_ext_csrc}/merge/cuda/backward.cu
  ${timm_ext_csrc}/merge/cuda/backward_matrices.cu
  ${timm_ext_csrc}/merge/cuda/forward.cu
  ${timm_ext_csrc}/merge/cuda/general.cu
  ${timm_ext_csrc}/merge/cuda/stitch.cu)
