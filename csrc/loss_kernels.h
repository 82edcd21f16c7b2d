// All kernels of the pathway loss, in order of dependence; see flavours.h.
#include "storage.h"
//
#include "flat_kernels.h"
//
#include "channels_kernels.h"
#include "planes_kernels.h"
//
#include "pathway_kernels.h"
