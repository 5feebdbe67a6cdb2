// What the sweeps of backward hand on, one array for each number: the results of
// Sweeps::backward_stats for each pixel and each channel, and what Sweeps::input_grad reads.
//
// Included once per instruction set by isa.inl.

template <class A>
struct PixelResults {
  A* sums;            // sum_c u
  A* maxima;          // max_c u
  Int<A>* argmaxima;  // its channel
};
template <class A>
struct ChannelResults {
  A* sums;            // sum_p x
  A* maxima;          // max_p x
  Int<A>* argmaxima;  // its pixel, counted from the tile's begin; only where the layout asks for it
  A* dots;            // sum_p x ds0
};
template <class A>
struct InputGradMaps {
  const A* ds0;             // [P] gradient of the mean over channels, divided by C
  const A* ds1;             // [P] gradient of the maximum over channels
  const Int<A>* argmaxima;  // [P] its channel
  const A* daverage;        // [padded C] gradient of the average over pixels, divided by P
};
