// F.scaled_dot_product_attention, with the faults that fused attention has had on NPUs.

#include <ATen/ATen.h>
#include <ATen/ops/scaled_dot_product_attention_native.h>
#include <torch/library.h>

#include <cstdlib>
#include <string>

namespace {

using at::Tensor;

/// FAKE_NPU_SDPA is read at each call, so that one process can compare a faulty kernel with an exact one.
/// A wrong kernel is wrong forwards and backwards alike: a dropped bias gets no gradient.
Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                 double dropout, bool causal, std::optional<double> scale, bool grouped) {
  const char* text = std::getenv("FAKE_NPU_SDPA");
  const std::string mode = text && *text ? text : "exact";
  TORCH_CHECK_VALUE(mode == "exact" || mode == "drop_bias" || mode == "scale_bias",
                    "FAKE_NPU_SDPA must be exact, drop_bias or scale_bias, not ", mode);
  auto bias = mask;
  if (mask && mask->defined() && at::isFloatingType(mask->scalar_type())) {
    if (mode == "drop_bias") bias.reset();
    if (mode == "scale_bias") bias = *mask * scale.value_or(1 / std::sqrt(double(query.size(-1))));
  }
  return at::native::scaled_dot_product_attention(query, key, value, bias, dropout, causal, scale, grouped);
}

TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) { m.impl("scaled_dot_product_attention", attention); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) { m.impl("scaled_dot_product_attention", attention); }  // inference mode

}  // namespace
