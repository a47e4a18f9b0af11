// Activations, a vector at a time. Included by isa.h, under its rules.

namespace coreskip {
namespace CORESKIP_ISA {

// Within 2 ulp of e^x; infinity above the range, NaN for NaN. libm's scalar expf took 8 % of a dense layer's time.
static inline V exp(V x) {
    x = lesser(splat(89.f), greater(splat(-104.f), x));  // this order keeps NaN
    const float magic = 0x1.8p23f;  // adding and subtracting it rounds to an integer
    V n = (x * 0x1.715476p0f + magic) - magic;
    V r = x - n * 0x1.62e400p-1f;  // ln 2 in two parts, the first short enough to multiply exactly
    r = r - n * 0x1.7f7d1cp-20f;
    V p = splat(1.f / 5040);
    p = p * r + 1.f / 720;
    p = p * r + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    // 2^n in two factors: n may be 128 or below -126, where one factor would not be a normal number.
    VI whole = __builtin_convertvector(n, VI), half = whole >> 1;
    return p * (V)((half + 127) << 23) * (V)((whole - half + 127) << 23);
}

static inline V sigmoid_times(V x, V y) { return x / (1.f + exp(-y)); }

static inline V erf_gelu(V x) {
    float lane[kLanes];
    store(lane, x * 0x1.6a09e6p-1f);
    for (int i = 0; i < kLanes; i++) lane[i] = erff(lane[i]);
    return 0.5f * x * (1.f + load(lane));
}

// e^x - 1 for x up to 0: near 0, where a difference would cancel, by its series.
static inline V expm1_below(V x) {
    const V near = x * (1.f + x * (0.5f + x * (1.f / 6 + x * (1.f / 24 + x * (1.f / 120 + x * (1.f / 720))))));
    return x > -0.25f ? near : exp(x) - 1.f;
}

static inline V curve_of(V x, const float* curve) {
    const V low = x > 0.f ? V{} : x, above = x * (curve[0] * x + curve[1]);
    return x > 0.f ? above : curve[2] * expm1_below(low) + curve[3] * low;  // this order keeps NaN
}

// curve: of kCurve, else not looked at.
static inline V activate(V x, int act, const float* curve) {
    switch (act) {
        case kCurve: return curve_of(x, curve);
        case kSilu: return sigmoid_times(x, x);
        case kGelu: return erf_gelu(x);
        // 1 + tanh(y) is 2 sigmoid(2y)
        case kGeluTanh: return sigmoid_times(x, 2 * 0x1.988454p-1f * (x + 0.044715f * x * x * x));
        default: {
            V positive = x < 0.f ? V{} : x;  // this order keeps NaN
            return act == kRelu2 ? positive * positive : positive;
        }
    }
}

}  // namespace CORESKIP_ISA
}  // namespace coreskip
