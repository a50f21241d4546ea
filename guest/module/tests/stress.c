// SPDX-License-Identifier: GPL-2.0
/*
 * Works outboard_dma hard, through a function that it serves: a driver without a device of its own, to be bound by driver_override. It never
 * lets the device do anything. Writing a command to /sys/kernel/debug/outboard_stress/run runs it, reading that file shows what it saw.
 *
 *   clusters N   N live mappings of 4 KiB in clusters of 16 to 64, shared out among the CPUs, released in random order
 *   spread BYTES one live mapping of 4 KiB in each BYTES of all RAM, released in random order; what fails, fails
 *   leak N       as clusters, and forgets them
 *   fill BYTES   one live mapping of BYTES in each BYTES, likewise
 *   press BYTES N  as fill, and then N steps on each CPU that give a mapping up and at once ask for another
 *   coherent N   N pieces of memory for both sides, of many sizes
 *   mixed N      N steps on each CPU: singles and lists, in process, with interrupts off, in softirqs and in hard interrupts
 *   misuse WHAT  a driver's mistakes, and a few things that are none: misuse.c
 *   churn MODE LIVE PAIRS  nanoseconds of an unmapping and a mapping, MODE ours or published
 *   lists MODE N           N lists of 256 entries; exits of the published scheme
 */
#include "stress.h"

#include "bench.h"

#include <linux/debugfs.h>
#include <linux/ioport.h>
#include <linux/kthread.h>
#include <linux/ktime.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/slab.h>
#include <linux/sort.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

phys_addr_t stress_ram_start, stress_ram_end;

static bool shy;
module_param(shy, bool, 0444);
MODULE_PARM_DESC(shy, "Do nothing about DMA when bound, as drivers that start with it later");

static struct dentry *folder;
static DEFINE_MUTEX(running);
static struct device *device;
static char report[2048];
static struct worker *workers;
static int cpus;

static void softirq_step(struct tasklet_struct *tasklet)
{
	struct worker *worker = container_of(tasklet, struct worker, tasklet);

	worker->step(worker);
	complete(&worker->stepped);
}

static void hardirq_step(struct irq_work *work)
{
	struct worker *worker = container_of(work, struct worker, irq_work);

	worker->step(worker);
	complete(&worker->stepped);
}

/* Clusters of neighbours, each within 256 KiB of its own. */
static void cluster_step(struct worker *worker)
{
	u64 blocks = (stress_ram_end - stress_ram_start) / SZ_256K;
	u32 size = 16 + stress_random(worker, 49), first = stress_random(worker, 65 - size), i;
	phys_addr_t block = stress_ram_start + worker->first % blocks * SZ_256K;

	worker->first += cpus;
	for (i = first; i < first + size && worker->count < worker->most; i++)
		stress_map(worker, block + i * PAGE_SIZE, PAGE_SIZE);
}

/* Some of the pieces of RAM, `stride` long each, that are this CPU's share. */
static void spread_step(struct worker *worker)
{
	u64 places = (stress_ram_end - stress_ram_start) / worker->stride;
	int i;

	for (i = 0; i < 16 && worker->first < places; i++, worker->first += cpus) {
		phys_addr_t piece = stress_ram_start + worker->first * worker->stride;
		u64 within = (u64)stress_random(worker, worker->stride / PAGE_SIZE) * PAGE_SIZE;

		if (worker->whole)
			stress_map(worker, piece, worker->stride);
		else
			stress_map(worker, piece + within, PAGE_SIZE);
	}
}

/* Asks for the piece that has waited longest; those not mapped stand at the end of `live`. */
static bool refill(struct worker *worker)
{
	u32 had = worker->count;
	phys_addr_t phys;

	if (!worker->spare)
		return false;
	phys = worker->live[worker->most - worker->spare--].phys;
	stress_map(worker, phys, worker->stride);
	if (worker->count > had)
		return true;
	worker->live[worker->most - ++worker->spare].phys = phys;
	return false;
}

/* Asks for every piece once. Then, with all of the host's room in use, gives one up and at once asks for another. */
static void press_step(struct worker *worker)
{
	u64 places = (stress_ram_end - stress_ram_start) / worker->stride;
	int i;

	for (i = 0; i < 8; i++) {
		u32 had = worker->count, gone;
		phys_addr_t phys = stress_ram_start + worker->first * worker->stride;

		if (worker->first < places) {
			worker->first += cpus;
			stress_map(worker, phys, worker->stride);
			if (worker->count == had)
				worker->live[worker->most - ++worker->spare].phys = phys;
			continue;
		}
		while (refill(worker))
			;
		if (!worker->count || !worker->spare)
			return;
		gone = stress_random(worker, worker->count);
		phys = worker->live[gone].phys;
		stress_unmap(worker, gone);
		refill(worker);
		/* Behind all others that wait. */
		gone = worker->most - ++worker->spare;
		memmove(&worker->live[gone], &worker->live[gone + 1], (worker->spare - 1) * sizeof(*worker->live));
		worker->live[worker->most - 1].phys = phys;
	}
}

static bool more(struct worker *worker)
{
	if (worker->step == press_step && worker->first < (stress_ram_end - stress_ram_start) / worker->stride)
		return true;
	if (worker->step == cluster_step)
		return worker->count < worker->most && worker->failed < 1000;
	if (worker->step == spread_step)
		return worker->first < (stress_ram_end - stress_ram_start) / worker->stride;
	return worker->rounds-- > 0;
}

static int run_worker(void *arg)
{
	struct worker *worker = arg;

	while (more(worker)) {
		stress_run_in(worker, stress_random(worker, PLACES));
		cond_resched();
	}
	complete(&worker->done);
	return 0;
}

static int release_worker(void *arg)
{
	struct worker *worker = arg;

	stress_release_all(worker);
	complete(&worker->done);
	return 0;
}

static int on_all(int (*function)(void *))
{
	int i, error = 0, started = 0;

	for (i = 0; i < cpus; i++) {
		struct task_struct *task = kthread_create(function, &workers[i], "stress/%d", workers[i].cpu);

		if (IS_ERR(task)) {
			error = PTR_ERR(task);
			break;
		}
		kthread_bind(task, workers[i].cpu);
		wake_up_process(task);
		started++;
	}
	for (i = 0; i < started; i++)
		wait_for_completion(&workers[i].done);
	return error;
}

static int by_bus(const void *a, const void *b)
{
	const struct mapping *x = a, *y = b;

	return x->bus < y->bus ? -1 : x->bus > y->bus;
}

/* Different memory must not be at the same bus address. */
static const char *check_apart(void)
{
	struct mapping *all;
	u64 total = 0, i, n = 0;
	const char *wrong = NULL;

	for (i = 0; i < cpus; i++)
		total += workers[i].count;
	all = vmalloc(array_size(total + 1, sizeof(*all)));
	if (!all)
		return "no memory to check it";
	for (i = 0; i < cpus; i++) {
		memcpy(&all[n], workers[i].live, workers[i].count * sizeof(*all));
		n += workers[i].count;
	}
	sort(all, n, sizeof(*all), by_bus, NULL);
	for (i = 1; i < n && !wrong; i++) {
		struct mapping *a = &all[i - 1], *b = &all[i];

		if (a->bus + a->len > b->bus && b->bus - a->bus != b->phys - a->phys)
			wrong = "different memory at the same bus address";
	}
	vfree(all);
	return wrong;
}

static void free_workers(void)
{
	int i, j;

	for (i = 0; workers && i < cpus; i++) {
		tasklet_kill(&workers[i].tasklet);
		irq_work_sync(&workers[i].irq_work);
		vfree(workers[i].live);
		for (j = 0; j < LISTS; j++)
			sg_free_table(&workers[i].lists[j].table);
	}
	kfree(workers);
	workers = NULL;
}

static int make_workers(void (*step)(struct worker *), u64 most, u64 stride, u32 rounds, bool whole)
{
	int cpu, i = 0, j;

	cpus = num_online_cpus();
	workers = kcalloc(cpus, sizeof(*workers), GFP_KERNEL);
	if (!workers)
		return -ENOMEM;
	for_each_online_cpu(cpu) {
		struct worker *worker = &workers[i];

		worker->dev = device;
		worker->cpu = cpu;
		worker->most = DIV_ROUND_UP(most, cpus);
		worker->step = step;
		worker->first = i++;
		worker->stride = stride;
		worker->whole = whole;
		worker->rounds = rounds;
		prandom_seed_state(&worker->random, 4711 + cpu);
		init_completion(&worker->done);
		init_completion(&worker->stepped);
		tasklet_setup(&worker->tasklet, softirq_step);
		init_irq_work(&worker->irq_work, hardirq_step);
		worker->live = vmalloc(array_size(worker->most, sizeof(*worker->live)));
		if (!worker->live)
			return -ENOMEM;
		for (j = 0; j < LISTS; j++)
			if (sg_alloc_table(&worker->lists[j].table, LIST_ENTRIES, GFP_KERNEL))
				return -ENOMEM;
		if (i == cpus)
			break;
	}
	return 0;
}

static u64 sum(size_t offset)
{
	u64 total = 0;
	int i;

	for (i = 0; i < cpus; i++)
		total += *(u64 *)((char *)&workers[i] + offset);
	return total;
}

#define SUM(field) sum(offsetof(struct worker, field))

static int run(void (*step)(struct worker *), u64 most, u64 stride, u32 rounds, bool whole, bool keep)
{
	int i, at = 0, error = make_workers(step, most, stride, rounds, whole);
	const char *wrong = NULL;
	ktime_t begin = ktime_get(), mapped;
	u64 live = 0;

	if (!error)
		error = on_all(run_worker);
	mapped = ktime_get();
	if (!error) {
		wrong = check_apart();
		for (i = 0; i < cpus; i++) {
			live += workers[i].count;
			wrong = wrong ?: workers[i].wrong;
		}
		if (!keep)
			error = on_all(release_worker);
		at += scnprintf(report + at, sizeof(report) - at,
				"live %llu\nmapped %llu\nfailed %llu\nlists %llu\nlists_failed %llu\nentries %llu\nsegments %llu\n",
				live, SUM(mapped), SUM(failed), SUM(lists_mapped), SUM(lists_failed), SUM(entries),
				SUM(segments));
		at += scnprintf(report + at, sizeof(report) - at,
				"in_process %llu\nirqs_off %llu\nin_softirq %llu\nin_hardirq %llu\n",
				SUM(places[IN_PROCESS]), SUM(places[IRQS_OFF]), SUM(places[IN_SOFTIRQ]),
				SUM(places[IN_HARDIRQ]));
		at += scnprintf(report + at, sizeof(report) - at, "map_ms %lld\nrelease_ms %lld\nwrong %s\n",
				ktime_ms_delta(mapped, begin), ktime_ms_delta(ktime_get(), mapped),
				wrong ?: "nothing");
	}
	free_workers();
	return error ?: wrong ? -EUCLEAN : 0;
}

/* Memory for both sides of all sizes up to 1 MiB: aligned to its size on the bus, zeroed, writable to its end. */
static int coherent(u32 count)
{
	struct { void *memory; dma_addr_t bus; size_t size; } *all = kvcalloc(count, sizeof(*all), GFP_KERNEL);
	const char *wrong = NULL;
	u32 i, made = 0, failed = 0;

	if (!all)
		return -ENOMEM;
	for (i = 0; i < count; i++) {
		size_t size = PAGE_SIZE * (1 + i * 7 % 256), alignment = PAGE_SIZE << get_order(size);

		all[i].size = size;
		all[i].memory = dma_alloc_coherent(device, size, &all[i].bus, GFP_KERNEL | __GFP_NOWARN);
		if (!all[i].memory) {
			failed++;
			continue;
		}
		made++;
		if (!IS_ALIGNED(all[i].bus, alignment))
			wrong = "memory that is not aligned to its size on the bus";
		if (memchr_inv(all[i].memory, 0, size))
			wrong = "memory that is not zeroed";
		memset(all[i].memory, 0x5a, size);
	}
	for (i = 0; i < count; i++)
		if (all[i].memory)
			dma_free_coherent(device, all[i].size, all[i].memory, all[i].bus);
	kvfree(all);
	scnprintf(report, sizeof(report), "live %u\nmapped %u\nfailed %u\nlists_failed 0\nwrong %s\n", made, made,
		  failed, wrong ?: "nothing");
	return wrong ? -EUCLEAN : 0;
}

static int command(const char *text)
{
	u64 ram = stress_ram_end - stress_ram_start, number, rounds;
	int error = bench_command(device, text, report, sizeof(report));

	if (error == -ENOENT)
		error = stress_misuse(device, text, report, sizeof(report));
	if (error != -ENOENT)
		return error;
	if (sscanf(text, "clusters %llu", &number) == 1 && number > 0 && number < 1 << 22)
		return run(cluster_step, number, 0, 0, false, false);
	if (sscanf(text, "spread %llu", &number) == 1 && number >= PAGE_SIZE && number <= ram)
		return run(spread_step, ram / number + num_online_cpus(), number, 0, false, false);
	if (sscanf(text, "fill %llu", &number) == 1 && number >= PAGE_SIZE && number <= SZ_1G)
		return run(spread_step, ram / number + num_online_cpus(), number, 0, true, false);
	if (sscanf(text, "press %llu %llu", &number, &rounds) == 2 && number >= PAGE_SIZE && number <= SZ_1G && rounds < 1 << 22)
		return run(press_step, ram / number + num_online_cpus(), number, rounds, true, false);
	if (sscanf(text, "coherent %llu", &number) == 1 && number > 0 && number < 1 << 16)
		return coherent(number);
	if (sscanf(text, "mixed %llu", &number) == 1 && number > 0 && number < 1 << 22)
		return run(stress_mixed_step, 40000, 0, number, false, false);
	if (sscanf(text, "leak %llu", &number) == 1 && number > 0 && number < 1 << 16)
		return run(cluster_step, number, 0, 0, false, true);
	return -EINVAL;
}

static ssize_t run_write(struct file *file, const char __user *text, size_t len, loff_t *pos)
{
	char line[64];
	int error;

	if (len >= sizeof(line))
		return -EINVAL;
	if (copy_from_user(line, text, len))
		return -EFAULT;
	line[len] = 0;
	mutex_lock(&running);
	report[0] = 0;
	error = device ? command(line) : -ENODEV;
	mutex_unlock(&running);
	return error ?: len;
}

static ssize_t run_read(struct file *file, char __user *text, size_t len, loff_t *pos)
{
	return simple_read_from_buffer(text, len, pos, report, strlen(report));
}

static const struct file_operations run_fops = {
	.owner = THIS_MODULE,
	.read = run_read,
	.write = run_write,
	.llseek = default_llseek,
};

/* The largest piece of RAM. */
static int take_ram(struct resource *res, void *unused)
{
	if (resource_size(res) > stress_ram_end - stress_ram_start) {
		stress_ram_start = ALIGN(res->start, SZ_1M);
		stress_ram_end = ALIGN_DOWN(res->end + 1, SZ_1M);
	}
	return 0;
}

static int probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	int error = shy ? 0 : dma_set_mask_and_coherent(&pdev->dev, DMA_BIT_MASK(64));

	if (error)
		return error;
	mutex_lock(&running);
	device = &pdev->dev;
	mutex_unlock(&running);
	return 0;
}

static void remove(struct pci_dev *pdev)
{
	mutex_lock(&running);
	device = NULL;
	mutex_unlock(&running);
}

/* For nothing by itself: bound by driver_override. */
static const struct pci_device_id ids[] = {
	{ PCI_DEVICE_DRIVER_OVERRIDE(PCI_ANY_ID, PCI_ANY_ID, PCI_ID_F_VFIO_DRIVER_OVERRIDE) },
	{ }
};

static struct pci_driver driver = {
	.name = "outboard_stress",
	.id_table = ids,
	.probe = probe,
	.remove = remove,
};

static int __init stress_init(void)
{
	walk_iomem_res_desc(IORES_DESC_NONE, IORESOURCE_SYSTEM_RAM | IORESOURCE_BUSY, 0, U64_MAX, NULL, take_ram);
	if (stress_ram_end <= stress_ram_start)
		return -ENODEV;
	folder = debugfs_create_dir("outboard_stress", NULL);
	debugfs_create_file("run", 0600, folder, NULL, &run_fops);
	return pci_register_driver(&driver);
}

static void __exit stress_exit(void)
{
	pci_unregister_driver(&driver);
	debugfs_remove_recursive(folder);
}

module_init(stress_init);
module_exit(stress_exit);
MODULE_DESCRIPTION("Stress test of outboard_dma");
MODULE_LICENSE("GPL");
