// All kernels of the pathway loss, in the order in which they need each other; see flavours.h.
#include "storage.h"
//
#include "flat_kernels.h"
//
#include "channels_kernels.h"
#include "planes_kernels.h"
//
#include "pathway_kernels.h"
