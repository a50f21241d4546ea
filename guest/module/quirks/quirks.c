// SPDX-License-Identifier: GPL-2.0
/* Quirks of drivers that meet a Mac from inside a virtual machine: arming them, and what modules that come and go mean to them. */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/completion.h>
#include <linux/kernel.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/mutex.h>
#include <linux/notifier.h>

#include "quirks.h"

static struct outboard_quirk *const quirks[] = { &outboard_quirk_uvm, &outboard_quirk_tso, &outboard_quirk_dczva };

/* Everything about the quirks but what runs in their probes. */
static DEFINE_MUTEX(quirks_mutex);
static bool armed;
/* All are armed. Not the mutex: modules come with the list of notifiers locked, which joining that list needs too. */
static DECLARE_COMPLETION(started);

void outboard_quirk_say(struct outboard_quirk *quirk, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vscnprintf(quirk->state, sizeof(quirk->state), format, arguments);
	va_end(arguments);
	pr_info("quirk %s: %s\n", quirk->name, quirk->state);
}

static int show_quirks(char *buffer, const struct kernel_param *param)
{
	size_t i;
	int length = 0;

	mutex_lock(&quirks_mutex);
	for (i = 0; i < ARRAY_SIZE(quirks); i++)
		length += scnprintf(buffer + length, PAGE_SIZE - length, "%s: %s\n", quirks[i]->name, quirks[i]->state);
	mutex_unlock(&quirks_mutex);
	return length;
}

static const struct kernel_param_ops show_ops = { .get = show_quirks };
module_param_cb(quirks, &show_ops, NULL, 0444);
MODULE_PARM_DESC(quirks, "What each quirk is doing (read only)");

static int on_module(struct notifier_block *block, unsigned long event, void *data)
{
	size_t i;

	if (data == THIS_MODULE)
		return NOTIFY_DONE;
	wait_for_completion(&started);
	mutex_lock(&quirks_mutex);
	for (i = 0; armed && i < ARRAY_SIZE(quirks); i++) {
		struct outboard_quirk *quirk = quirks[i];

		if (!quirk->started)
			continue;
		if (event == MODULE_STATE_COMING && quirk->module_comes)
			quirk->module_comes(quirk, data);
		else if (event == MODULE_STATE_GOING && quirk->module_goes)
			quirk->module_goes(quirk, data);
	}
	mutex_unlock(&quirks_mutex);
	return NOTIFY_DONE;
}

/* Before the kernel's own kprobes drop what they have in a module that goes. */
static struct notifier_block notifier = { .notifier_call = on_module, .priority = 1 };

/* Under the mutex. */
static void arm(struct outboard_quirk *quirk)
{
	if (quirk->started)
		return;
	quirk->started = true;
	quirk->start(quirk);
}

void outboard_quirks_served(struct pci_dev *pdev)
{
	size_t i;

	mutex_lock(&quirks_mutex);
	for (i = 0; armed && i < ARRAY_SIZE(quirks); i++)
		if (*quirks[i]->wanted < 0 && quirks[i]->needed_by(pdev))
			arm(quirks[i]);
	mutex_unlock(&quirks_mutex);
}

int outboard_quirks_init(void)
{
	size_t i;
	/* First: a module that comes from now on waits until all are armed. */
	int error = register_module_notifier(&notifier);

	if (error)
		return error;
	mutex_lock(&quirks_mutex);
	for (i = 0; i < ARRAY_SIZE(quirks); i++) {
		struct outboard_quirk *quirk = quirks[i];

		if (*quirk->wanted > 0)
			arm(quirk);
		else
			outboard_quirk_say(quirk, "off: %s", *quirk->wanted ? quirk->needs : "by parameter");
	}
	armed = true;
	mutex_unlock(&quirks_mutex);
	complete_all(&started);
	return 0;
}

void outboard_quirks_exit(void)
{
	size_t i;

	mutex_lock(&quirks_mutex);
	for (i = 0; armed && i < ARRAY_SIZE(quirks); i++)
		if (quirks[i]->started)
			quirks[i]->stop(quirks[i]);
	armed = false;
	mutex_unlock(&quirks_mutex);
	/* Waits for calls that are under way; those find nothing armed. */
	unregister_module_notifier(&notifier);
}
