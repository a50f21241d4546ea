// SPDX-License-Identifier: GPL-2.0
/* NVIDIA UVM: requests for system memory in large pages become requests for the default page size (core/src/quirks/uvm.rs says why). */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/atomic.h>
#include <linux/kernel.h>
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/pci.h>
#include <linux/string.h>
#include <linux/uaccess.h>

#include "core.h"
#include "quirks.h"

static int quirk_uvm = -1;
module_param(quirk_uvm, int, 0444);
MODULE_PARM_DESC(quirk_uvm, "NVIDIA UVM asks for default pages instead of 64 KiB and 2 MiB ones: 1 yes, 0 no, -1 where an NVIDIA function is served (default)");

static unsigned int uvm_changed;
module_param(uvm_changed, uint, 0444);
MODULE_PARM_DESC(uvm_changed, "Requests of NVIDIA UVM changed so far (read only)");

/* Requests that are not what is known, after which the structure is taken for another one. */
#define STRANGE_LIMIT 5
#define OWNER "nvidia"
#define SYMBOL "nvUvmInterfaceMemoryAllocSys"

static atomic_t strange;
static bool hooked;

/* The first members of UvmGpuAllocInfo (nv_uvm_types.h). */
struct alloc_info {
	u64 physical_offset;
	u64 page_size;
	u64 alignment;
};

/* NV_STATUS nvUvmInterfaceMemoryAllocSys(vaSpace, NvLength length, UvmGpuPointer *gpuPointer, UvmGpuAllocInfo *allocInfo).
 * Interrupts may be off in here: nothing sleeps, and what cannot be read is left alone.
 */
static int on_alloc(struct kprobe *probe, struct pt_regs *regs)
{
	struct alloc_info *info = (struct alloc_info *)regs->regs[3];
	struct alloc_info now;
	u64 zero = 0;

	if (atomic_read(&strange) >= STRANGE_LIMIT)
		return 0;
	/* Also refuses addresses that are not the kernel's. */
	if (!IS_ALIGNED(regs->regs[3], sizeof(u64)) || copy_from_kernel_nofault(&now, info, sizeof(now)))
		goto odd;
	switch (odma_core_uvm_judge(regs->regs[1], now.physical_offset, now.page_size, now.alignment)) {
	case ODMA_UVM_LEAVE:
		return 0;
	case ODMA_UVM_DEFAULT:
		pagefault_disable();
		__put_kernel_nofault(&info->page_size, &zero, u64, unwritable);
		pagefault_enable();
		WRITE_ONCE(uvm_changed, uvm_changed + 1);
		return 0;
	}
odd:
	if (atomic_inc_return(&strange) == STRANGE_LIMIT)
		pr_warn("quirk uvm: off: %d requests of " SYMBOL " were not as known; this driver's UvmGpuAllocInfo may have another layout\n",
			STRANGE_LIMIT);
	return 0;
unwritable:
	pagefault_enable();
	goto odd;
}

static struct kprobe probe;

static void hook(struct outboard_quirk *quirk)
{
	int error;

	if (hooked)
		return;
	/* The kernel leaves its own marks in there. */
	memset(&probe, 0, sizeof(probe));
	probe.symbol_name = SYMBOL;
	probe.pre_handler = on_alloc;
	atomic_set(&strange, 0);
	error = register_kprobe(&probe);
	hooked = !error;
	if (!error)
		outboard_quirk_say(quirk, "on: " SYMBOL " is watched");
	else if (error == -ENOENT)
		outboard_quirk_say(quirk, "waits for a module " OWNER " with " SYMBOL);
	else
		outboard_quirk_say(quirk, "off: no kprobe on " SYMBOL " (error %d)", error);
}

static void unhook(void)
{
	if (hooked)
		unregister_kprobe(&probe);
	hooked = false;
}

static void start(struct outboard_quirk *quirk)
{
	hook(quirk);
}

static void stop(struct outboard_quirk *quirk)
{
	unhook();
}

static void module_comes(struct outboard_quirk *quirk, struct module *module)
{
	if (!strcmp(module->name, OWNER))
		hook(quirk);
}

static void module_goes(struct outboard_quirk *quirk, struct module *module)
{
	if (strcmp(module->name, OWNER))
		return;
	unhook();
	outboard_quirk_say(quirk, "waits for a module " OWNER " with " SYMBOL);
}

static bool needed_by(struct pci_dev *pdev)
{
	return pdev->vendor == PCI_VENDOR_ID_NVIDIA;
}

struct outboard_quirk outboard_quirk_uvm = {
	.name = "uvm",
	.wanted = &quirk_uvm,
	.needed_by = needed_by,
	.needs = "no function of NVIDIA's is served",
	.start = start,
	.stop = stop,
	.module_comes = module_comes,
	.module_goes = module_goes,
};
