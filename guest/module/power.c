// SPDX-License-Identifier: GPL-2.0
/* Sleep, hibernation and what comes back from it. Device links have the DMA device sleep after the functions that it serves, and wake before. */
#include "odma.h"

#include <linux/suspend.h>

/*
 * Bus addresses are the host's choice and gone with the machine's power: a driver's rings cannot be put back where its device was told that they
 * are. Without a driver that is served nothing stands in the way.
 */
static int before(struct notifier_block *block, unsigned long event, void *unused)
{
	return event == PM_HIBERNATION_PREPARE && odma_any_bound() ? notifier_from_errno(-EBUSY) : NOTIFY_DONE;
}

static struct notifier_block notifier = { .notifier_call = before };

/* Sleep leaves the host and its mappings as they are. Says so where it did not. */
static int __maybe_unused woken(struct device *dev)
{
	struct odma_domain *domain = dev_get_drvdata(dev);

	/* Read by its driver's own way: the command register is restored, the device is there. */
	if (!odma_running(domain) && odma_domain_uses(domain))
		dev_err(dev, "the host was reset in the guest's sleep: what drivers have mapped is gone. Unbind and bind them\n");
	return 0;
}

/* Another kernel has had the DMA device since: what it mapped goes, and so does what this one thinks is mapped. */
static int __maybe_unused restored(struct device *dev)
{
	return odma_restart(dev_get_drvdata(dev));
}

const struct dev_pm_ops odma_pm = {
#ifdef CONFIG_PM_SLEEP
	.resume_early = woken,
	.thaw_early = woken,
	.restore_early = restored,
#endif
};

int odma_power_init(void)
{
	return register_pm_notifier(&notifier);
}

void odma_power_exit(void)
{
	unregister_pm_notifier(&notifier);
}
