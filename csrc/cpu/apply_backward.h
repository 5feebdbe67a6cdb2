// The gradient of forward's second phase alone, where something stands between the phases:
//
//   gate gradients  read x, g   sum_c g u per pixel -> the gradient of the logits; sum_p g sa x per
//                               channel, the gradient of ca
//
// Backward begins with the same sweep, where nothing stands between the phases (backward.h).
//
// Included once per instruction set by isa.inl.

template <class A>
inline void add_all_tiles(const Shape& shape, const A* tiles, A* sums) {
  for (int64_t c = 0; c < shape.padded_c; c += kLanes<A>) {
    store(sums + c, add_tiles(shape, tiles, c));
  }
}

// What that sweep finds about the channels.
template <class A>
struct GateDots {
  GateDots(Arena& arena, const Shape& shape)
      : tiles(arena.channels<A>(shape, shape.tiles)), sums(arena.channels<A>(shape)) {}
  A* tiles;  // [tiles, padded C] sum_p g sa x
  A* sums;   // [padded C] the same, added up
};

// From the gradient of the gate of a tile's pixels to that of their logits.
template <class A>
inline void through_sigmoid(Tile tile, const A* sa, A* grads) {
  each_vector<A>(tile.size(), [&](int64_t i, auto part) {
    const Vec<A> gate = load(sa + tile.begin + i, part);
    store(grads + i, gate * (A{1} - gate) * load(grads + i, part), part);
  });
}

// The sweep over (x, g) for one tile: the gradient of its pixels' logits.
template <class S, class Sweeps, class A>
[[gnu::flatten]] void tile_gate_grads(const Shape& shape, int64_t t, const S* x, const S* g,
                                      const A* ca, const A* sa, const GateDots<A>& dots,
                                      A* dlogits) {
  const Tile tile(shape, t);
  Sweeps::gate_grads(shape, tile, x, g, ca, sa, dlogits, dots.tiles + t * shape.padded_c);
  through_sigmoid(tile, sa, dlogits);
}

template <class A>
struct ApplyBackwardMemory {
  ApplyBackwardMemory(Arena& arena, const Shape& shape) : gates(arena, shape), dots(arena, shape) {}
  GateMemory<A> gates;
  GateDots<A> dots;
};

template <class S, class Sweeps>
void apply_backward(const ApplyBackwardArgs& args) {
  using A = Acc<S>;
  const Shape shape(args.problem);
  using Memory = ApplyBackwardMemory<A>;
  each_sample<S, Memory>(shape, [&](const Sample<S>& sample, const Memory& memory) {
    const GateMemory<A>& gates = memory.gates;
    const S* x = sample.features(args.input);
    const S* g = sample.features(args.grad_output);
    const A* logits = sample.values(args.logits, shape.pixels);
    A* grad_logits = sample.values(args.grad_logits, shape.pixels);
    std::copy_n(sample.values(args.channel_gate, shape.c), shape.c, gates.ca);
    for_each_unit(sample.parallel, shape.tiles, [&](int64_t t) {
      const Tile tile(shape, t);
      A dlogits[Shape::kMaxTile];
      sigmoid_tile(tile, logits, gates.sa);
      tile_gate_grads<S, Sweeps>(shape, t, x, g, gates.ca, gates.sa, memory.dots, dlogits);
      std::copy_n(dlogits, tile.size(), grad_logits + tile.begin);
    });
    add_all_tiles(shape, memory.dots.tiles, memory.dots.sums);
    std::copy_n(gates.sa, shape.pixels, sample.values(args.spatial_gate, shape.pixels));
    std::copy_n(memory.dots.sums, shape.c, sample.values(args.grad_channel_gate, shape.c));
  });
}
