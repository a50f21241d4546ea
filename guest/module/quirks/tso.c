// SPDX-License-Identifier: GPL-2.0
/* Total store order: where the host has switched it on for every vCPU, programs may learn so the way they do on Asahi's kernel.
 *
 * Apple's CPUs order memory as x86 does while ACTLR_EL1.EnTSO is set. The monitor sets it for a vCPU's whole life. FEX asks for the mode by
 * prctl(PR_SET_MEM_MODEL) and leaves out its costly emulation if that succeeds; PR_GET_MEM_MODEL answers 'default', so that it asks.
 * Only what the kernel itself did not know (-EINVAL) is answered here.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <asm/cputype.h>
#include <asm/sysreg.h>
#include <linux/cpuhotplug.h>
#include <linux/kernel.h>
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/ptrace.h>

#include "quirks.h"

static int quirk_tso = -1;
module_param(quirk_tso, int, 0444);
MODULE_PARM_DESC(quirk_tso, "Answer prctl(PR_SET_MEM_MODEL) where every CPU has total store order: 1 yes, 0 no, -1 where a function is served (default)");

static int test_tso_cpus = -1;
module_param(test_tso_cpus, int, 0444);
MODULE_PARM_DESC(test_tso_cpus, "For tests only: take the first N CPUs for ones with total store order, whatever they are");

#define PR_GET_MEM_MODEL 0x6d4d444c
#define PR_SET_MEM_MODEL 0x4d4d444c
#define MODEL_DEFAULT 0
#define MODEL_TSO 1
/* Apple's own register and bit; ACTLR_EL1 means something else on other CPUs. */
#define ENTSO BIT(1)
#define IMPLEMENTER_APPLE 0x61

/* No CPU without it was seen. A CPU may come later. */
static bool everywhere;
static int hotplug_state;
static bool hooked;

static bool here(unsigned int cpu)
{
	if (test_tso_cpus >= 0)
		return cpu < (unsigned int)test_tso_cpus;
	return MIDR_IMPLEMENTOR(read_cpuid_id()) == IMPLEMENTER_APPLE && (read_sysreg(actlr_el1) & ENTSO);
}

/* On each CPU: now, and when it comes. */
static int on_cpu(unsigned int cpu)
{
	if (!here(cpu) && READ_ONCE(everywhere)) {
		WRITE_ONCE(everywhere, false);
		if (hooked)
			pr_warn("quirk tso: off: CPU %u has no total store order\n", cpu);
	}
	return 0;
}

/* Nonzero: what it returns is not ours to change. */
static int on_entry(struct kretprobe_instance *instance, struct pt_regs *regs)
{
	/* The kernel's copy of the caller's registers. */
	const struct pt_regs *caller = (const struct pt_regs *)regs->regs[0];
	const u64 *a = caller->regs;
	bool unused = !a[2] && !a[3] && !a[4];

	if (!READ_ONCE(everywhere) || !unused)
		return 1;
	/* As prctl takes it: the number is an int. */
	if ((u32)a[0] == PR_GET_MEM_MODEL)
		return a[1] != 0;
	if ((u32)a[0] == PR_SET_MEM_MODEL)
		return a[1] != MODEL_DEFAULT && a[1] != MODEL_TSO;
	return 1;
}

static int on_return(struct kretprobe_instance *instance, struct pt_regs *regs)
{
	/* MODEL_DEFAULT for the one, success for the other. */
	if ((long)regs_return_value(regs) == -EINVAL)
		regs_set_return_value(regs, 0);
	return 0;
}

static struct kretprobe probe = {
	.kp.symbol_name = "__arm64_sys_prctl",
	.entry_handler = on_entry,
	.handler = on_return,
	/* At a time; what is beyond gets the kernel's own answer. */
	.maxactive = 32,
};

static void start(struct outboard_quirk *quirk)
{
	int error;

	everywhere = true;
	hotplug_state = cpuhp_setup_state(CPUHP_AP_ONLINE_DYN, "outboard/tso:online", on_cpu, NULL);
	if (hotplug_state < 0) {
		outboard_quirk_say(quirk, "off: CPUs cannot be asked (error %d)", hotplug_state);
		hotplug_state = 0;
		return;
	}
	if (!READ_ONCE(everywhere)) {
		outboard_quirk_say(quirk, "off: not every CPU has total store order");
		return;
	}
	error = register_kretprobe(&probe);
	hooked = !error;
	if (error)
		outboard_quirk_say(quirk, "off: no kretprobe on %s (error %d)", probe.kp.symbol_name, error);
	else
		outboard_quirk_say(quirk, "on: %s", test_tso_cpus < 0 ? "every CPU has total store order" :
				   "FOR TESTS ONLY, total store order is pretended");
}

static void stop(struct outboard_quirk *quirk)
{
	if (hooked)
		unregister_kretprobe(&probe);
	hooked = false;
	if (hotplug_state > 0)
		cpuhp_remove_state(hotplug_state);
	hotplug_state = 0;
}

static bool needed_by(struct pci_dev *pdev)
{
	return true;
}

struct outboard_quirk outboard_quirk_tso = {
	.name = "tso",
	.wanted = &quirk_tso,
	.needed_by = needed_by,
	.needs = "no function is served",
	.start = start,
	.stop = stop,
};
