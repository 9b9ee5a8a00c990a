#ifndef HSTU_BUNDLE_HPP
#define HSTU_BUNDLE_HPP

//! Loads and runs bundles of hstu-compile with TensorRT 8.5 to 11 or TensorRT-RTX, by the headers that it is compiled
//! with: header-only, C++17, no dependency but the headers of TensorRT and CUDA and plugins/api/hstuAttentionKernels.h.
//! Nothing is linked to them: libnvinfer or libtensorrt_rtx, the CUDA driver and the kernels' library are found at run
//! time, so a program starts, reads bundles and says what is missing on a machine that has none of them.
//!
//!     using namespace hstu::loader;
//!     Bundle const bundle = Bundle::open("model.hstu");            // manifest, sha256 of every file
//!     Driver const driver(0);                                      // the CUDA driver, device 0
//!     TensorRt tensorRt("");                                       // libnvinfer.so of the headers' major version
//!     tensorRt.loadPlugin(bundle.pathOf(kPLUGIN_FILE), bundle.manifest()); // TensorRT alone
//!     GraphEntry const& graph = bundle.graph("");                  // the one that answers a request by itself
//!     auto const opened = openGraph(tensorRt, driver, bundle, graph); // one engine, or segments with kernels between
//!     Session session(tensorRt, driver, opened, 16);               // one stream, 16 CUDA graphs
//!     Tensors const answers = session.run(checkedFeeds(bundle.manifest(), graph, readNpz("request.npz")));
//!
//! Every function throws `Error` and nothing else. Ranking models with a KV cache: `RankingScorer`. The readers below
//! need no TensorRT header; include them alone to inspect bundles.

#include "hstu/bufferPlan.hpp"
#include "hstu/cudaGraph.hpp"
#include "hstu/driver.hpp"
#include "hstu/engine.hpp"
#include "hstu/error.hpp"
#include "hstu/feeds.hpp"
#include "hstu/file.hpp"
#include "hstu/fused.hpp"
#include "hstu/json.hpp"
#include "hstu/kernelLibrary.hpp"
#include "hstu/kvCache.hpp"
#include "hstu/loadedGraph.hpp"
#include "hstu/manifest.hpp"
#include "hstu/npy.hpp"
#include "hstu/npz.hpp"
#include "hstu/ranking.hpp"
#include "hstu/recordingGate.hpp"
#include "hstu/reference.hpp"
#include "hstu/schedule.hpp"
#include "hstu/session.hpp"
#include "hstu/sha256.hpp"
#include "hstu/statistics.hpp"
#include "hstu/tensor.hpp"
#include "hstu/tensorRt.hpp"

#endif // HSTU_BUNDLE_HPP
