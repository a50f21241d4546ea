/* SPDX-License-Identifier: GPL-2.0 */
#ifndef OUTBOARD_QUIRKS_H
#define OUTBOARD_QUIRKS_H

#include <linux/types.h>

struct pci_dev;

/* Arms what the user has asked for. A quirk that finds anything it does not know stays off and says so: none keeps the module from loading. 0, or
 * an error of the kernel's own.
 */
int outboard_quirks_init(void);
/* A function is served: arms the quirks that it needs and that nobody has decided about. May sleep; not under odma_mutex. */
void outboard_quirks_served(struct pci_dev *pdev);
/* Undoes all of it. */
void outboard_quirks_exit(void);

/* A quirk: one of the three below. */
struct outboard_quirk {
	const char *name;
	/* The parameter: 1 on, 0 off, -1 where a served function needs it. */
	int *wanted;
	/* Which functions need it, and the words for there being none. */
	bool (*needed_by)(struct pci_dev *pdev);
	const char *needs;
	/* Arms it, or sets its state to why not. Called once at most. */
	void (*start)(struct outboard_quirk *quirk);
	void (*stop)(struct outboard_quirk *quirk);
	/* Another module comes (its code is there and has not run) or goes. Called after start, before stop. */
	void (*module_comes)(struct outboard_quirk *quirk, struct module *module);
	void (*module_goes)(struct outboard_quirk *quirk, struct module *module);
	/* start was called. */
	bool started;
	/* What it is doing, for a person. Written under the quirks' mutex. */
	char state[160];
};

extern struct outboard_quirk outboard_quirk_uvm, outboard_quirk_tso, outboard_quirk_dczva;

/* Sets a quirk's state and says it in the kernel's log. */
__printf(2, 3) void outboard_quirk_say(struct outboard_quirk *quirk, const char *format, ...);

#endif
