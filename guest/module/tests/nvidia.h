/* SPDX-License-Identifier: GPL-2.0 */
#ifndef OUTBOARD_TEST_NVIDIA_H
#define OUTBOARD_TEST_NVIDIA_H

#include <linux/sizes.h>
#include <linux/types.h>

#define NV_ERR_INVALID_ARGUMENT 0x1f
#define NV_ERR_INVALID_OFFSET 0x37

/* UvmGpuAllocInfo as far as it matters here (facts, 5.1). */
struct uvm_alloc_info {
	u64 physical_offset;
	u64 page_size;
	u64 alignment;
	bool flags[8];
	u32 handle;
};

u32 nvUvmInterfaceMemoryAllocSys(void *space, u64 length, u64 *pointer, struct uvm_alloc_info *info);

#endif
