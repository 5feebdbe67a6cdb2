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
      : ca(arena.take<A>(shape.padded_c)), sa(arena.take<A>(shape.pixels)) {}
  A* ca;  // [padded C], padding zero
  A* sa;  // [P]
};

// What the first sweep of backward finds.
template <class A>
struct GateGrads {
  GateGrads(Arena& arena, const Shape& shape)
      : dl(arena.take<A>(shape.pixels)),
        tile_sums(arena.take<A>(shape.tiles * shape.padded_c)),
        dca(arena.take<A>(shape.padded_c)) {}
  A* dl;         // [P] gradient of the logits
  A* tile_sums;  // [tiles, padded C] sum_p g sa x
  A* dca;        // [padded C] the same, added up
};
