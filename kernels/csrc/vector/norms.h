// Norms, rotation, activations, and what is looked for in logits. Included by step_isa.h, under its rules.

namespace coreskip {
namespace CORESKIP_ISA {

static inline float sum_of_products(const float* a, const float* b, int64_t n) {
    V sum = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) sum += load(a + i) * load(b + i);
    float result = total(sum);
    for (; i < n; i++) result += a[i] * b[i];
    return result;
}

static void norm(const StepNorm& job, const float* x, float* y) {
    const int64_t n = job.size;
    float mean = 0;
    if (job.kind == kLayer) {
        for (int64_t i = 0; i < n; i++) mean += x[i];
        mean /= static_cast<float>(n);
        for (int64_t i = 0; i < n; i++) y[i] = x[i] - mean;
        x = y;
    }
    const float scale = 1.f / sqrtf(sum_of_products(x, x, n) / static_cast<float>(n) + job.eps);
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * job.weight[i] + (job.bias ? job.bias[i] : 0.f);
}

static void rotate(float* x, const float* cos, const float* sin, int64_t size, bool paired) {
    const int64_t half = size / 2;
    for (int64_t i = 0; paired && i < half; i++) {
        const float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = a * cos[i] - b * sin[i];
        x[2 * i + 1] = b * cos[i] + a * sin[i];
    }
    if (paired) return;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

static void scale(float* x, float factor, int64_t n) {
    for (int64_t i = 0; factor != 1.f && i < n; i++) x[i] *= factor;
}

static void act(float* gate, const float* up, int64_t n, int kind, const float* curve) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const V value = activate(load(gate + i), kind, curve);
        store(gate + i, up ? value * load(up + i) : value);
    }
    if (i == n) return;
    float a[kLanes] = {}, b[kLanes] = {};
    memcpy(a, gate + i, (n - i) * sizeof(float));
    if (up) memcpy(b, up + i, (n - i) * sizeof(float));
    const V value = activate(load(a), kind, curve);
    store(a, up ? value * load(b) : value);
    memcpy(gate + i, a, (n - i) * sizeof(float));
}

static void add_scaled(float* to, const float* from, float scale, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] += scale * from[i];
}

static inline V tanh_of(V x) { return 1.f - 2.f / (1.f + exp(x + x)); }

static void softcap(float* x, float scale, float cap, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const int64_t count = n - i < kLanes ? n - i : kLanes;
        float lane[kLanes] = {};
        memcpy(lane, x + i, count * sizeof(float));
        V v = load(lane) * scale;
        if (cap > 0) v = tanh_of(v / cap) * cap;
        store(lane, v);
        memcpy(x + i, lane, count * sizeof(float));
    }
}

static int64_t argmax(const float* x, int64_t n) {
    V most = splat(-HUGE_VALF);
    VI odd = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const V v = load(x + i);
        most = v > most ? v : most;
        odd |= v != v;
    }
    float top = greatest(most);
    bool strange = total(odd & 1) != 0;
    for (; i < n; i++) {
        top = x[i] > top ? x[i] : top;
        strange |= x[i] != x[i];
    }
    for (i = 0; i < n; i++)
        if (strange ? x[i] != x[i] : x[i] == top) return i;
    return 0;
}

// The sum of e^(x - most): what softmax divides by.
static float exp_sum(const float* x, int64_t n, float most) {
    V sum = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) sum += exp(load(x + i) - most);
    float last[kLanes];
    for (int k = 0; k < kLanes; k++) last[k] = i + k < n ? x[i + k] : -HUGE_VALF;
    return total(sum + exp(load(last) - most));
}

}  // namespace CORESKIP_ISA
}  // namespace coreskip
