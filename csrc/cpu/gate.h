// The second phase of forward and backward: the spatial gate from logits that come from outside.
//
// Included once per instruction set by isa.inl.

template <class A>
inline void sigmoid_tile(Tile tile, const A* logits, A* sa) {
  each_vector<A>(tile.size(), [&](int64_t i, auto part) {
    store(sa + tile.begin + i, sigmoid(load(logits + tile.begin + i, part)), part);
  });
}

template <class A>
struct Gates {
  Gates(Arena& arena, const Shape& shape)
      : ca(arena.channels<A>(shape)), sa(arena.take<A>(shape.pixels)) {}
  A* ca;  // [padded C], padding zero
  A* sa;  // [P]
};

// What the first sweep of backward finds about the channels.
template <class A>
struct GateGrads {
  GateGrads(Arena& arena, const Shape& shape)
      : tile_sums(arena.channels<A>(shape, shape.tiles)), dca(arena.channels<A>(shape)) {}
  A* tile_sums;  // [tiles, padded C] sum_p g sa x
  A* dca;        // [padded C] the same, added up
};
