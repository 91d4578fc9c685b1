#include <algorithm>
#include <cmath>
#include <limits>

#include "model/weights.h"

namespace earnest {

void selectExperts(float* probability, const float* correction, int64_t experts, int64_t active,
                   float norm_min, int32_t* chosen, float* weights) {
  float top = probability[0];
  for (int64_t e = 1; e < experts; ++e) top = std::max(top, probability[e]);
  float sum = 0;
  for (int64_t e = 0; e < experts; ++e) sum += probability[e] = std::exp(probability[e] - top);
  for (int64_t e = 0; e < experts; ++e) probability[e] /= sum;
  float total = 0;
  for (int64_t a = 0; a < active; ++a) {
    int32_t best = -1;
    float best_score = -std::numeric_limits<float>::infinity();
    for (int64_t e = 0; e < experts; ++e) {
      bool taken = false;
      for (int64_t b = 0; b < a; ++b) taken |= chosen[b] == e;
      if (taken) continue;
      const float score = correction ? probability[e] + correction[e] : probability[e];
      // A NaN is chosen only where nothing else is left.
      if (best < 0 || score > best_score || std::isnan(best_score)) {
        best = static_cast<int32_t>(e);
        best_score = score;
      }
    }
    chosen[a] = best;
    total += weights[a] = probability[best];
  }
  if (!(total >= norm_min) && !std::isnan(total)) total = norm_min;
  for (int64_t a = 0; a < active; ++a) weights[a] /= total;
}

}  // namespace earnest
