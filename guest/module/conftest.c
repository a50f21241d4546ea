// SPDX-License-Identifier: GPL-2.0
/* Each of these compiles where the kernel has what its name says. Compiled by Kbuild with one of the names defined. */
#include <linux/dma-map-ops.h>
#include <linux/module.h>

#if defined(ODMA_HAVE_DMA_OPS)
const void *conftest(struct device *dev);
const void *conftest(struct device *dev)
{
	return dev->dma_ops;
}
#elif defined(ODMA_HAVE_MAP_PHYS)
struct dma_map_ops conftest = { .map_phys = NULL };
#elif defined(ODMA_HAVE_ALLOC_PAGES_OP)
struct dma_map_ops conftest = { .alloc_pages_op = NULL };
#elif defined(ODMA_HAVE_MODULE_MEM)
const void *conftest(struct module *module);
const void *conftest(struct module *module)
{
	return module->mem[MOD_TEXT].base;
}
#endif
