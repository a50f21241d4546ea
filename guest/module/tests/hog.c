// SPDX-License-Identifier: GPL-2.0
/*
 * Takes the room that the host has for a function's mappings, beside the driver that works it: maps RAM in its name, and never lets the device do
 * anything with that. By /sys/kernel/debug/outboard_hog/run:
 *
 *   take ADDRESS  everything that can be had, large pieces first, until even the smallest is refused
 *   give          all of it back; before the function's driver goes
 *
 * Reading that file shows what it has and how often it was refused since it came.
 */
#include <linux/debugfs.h>
#include <linux/dma-mapping.h>
#include <linux/ioport.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/sizes.h>
#include <linux/uaccess.h>

#define MOST 4096

static struct dentry *folder;
static DEFINE_MUTEX(running);
static phys_addr_t ram_start, ram_end;
static struct pci_dev *owner;
static struct { dma_addr_t bus; u32 len; } pieces[MOST];
static u32 count;
static u64 refused, bytes;

/* Pieces of `len` bytes from `at` on, until one is refused; where the next would be. */
static phys_addr_t take_pieces(phys_addr_t at, u32 len)
{
	for (; count < MOST && at + len <= ram_end; at += len) {
		dma_addr_t bus = dma_map_page(&owner->dev, pfn_to_page(PHYS_PFN(at)), 0, len, DMA_TO_DEVICE);

		if (dma_mapping_error(&owner->dev, bus)) {
			refused++;
			break;
		}
		pieces[count].bus = bus;
		pieces[count++].len = len;
		bytes += len;
	}
	return at;
}

static void give(void)
{
	while (count) {
		count--;
		dma_unmap_page(&owner->dev, pieces[count].bus, pieces[count].len, DMA_TO_DEVICE);
	}
	bytes = 0;
	pci_dev_put(owner);
	owner = NULL;
}

static int take(const char *address)
{
	unsigned int domain, bus, device, function;
	int error = 0;

	if (owner)
		return -EBUSY;
	if (sscanf(address, "%x:%x:%x.%u", &domain, &bus, &device, &function) != 4)
		return -EINVAL;
	owner = pci_get_domain_bus_and_slot(domain, bus, PCI_DEVFN(device, function));
	if (!owner)
		return -ENODEV;
	device_lock(&owner->dev);
	if (owner->dev.driver)
		take_pieces(take_pieces(ram_start, SZ_1M), SZ_16K);
	else
		error = -ENODEV;
	device_unlock(&owner->dev);
	if (error)
		give();
	return error;
}

static ssize_t run_write(struct file *file, const char __user *text, size_t len, loff_t *pos)
{
	char line[64];
	int error = 0;

	if (len >= sizeof(line))
		return -EINVAL;
	if (copy_from_user(line, text, len))
		return -EFAULT;
	line[len] = 0;
	mutex_lock(&running);
	if (!strncmp(line, "take ", 5))
		error = take(line + 5);
	else if (!strncmp(line, "give", 4) && owner)
		give();
	else
		error = -EINVAL;
	mutex_unlock(&running);
	return error ?: len;
}

static ssize_t run_read(struct file *file, char __user *text, size_t len, loff_t *pos)
{
	char line[96];
	int size;

	mutex_lock(&running);
	size = scnprintf(line, sizeof(line), "pieces %u\nbytes %llu\nrefused %llu\n", count, bytes, refused);
	mutex_unlock(&running);
	return simple_read_from_buffer(text, len, pos, line, size);
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
	if (resource_size(res) > ram_end - ram_start) {
		ram_start = ALIGN(res->start, SZ_1M);
		ram_end = ALIGN_DOWN(res->end + 1, SZ_1M);
	}
	return 0;
}

static int __init hog_init(void)
{
	walk_iomem_res_desc(IORES_DESC_NONE, IORESOURCE_SYSTEM_RAM | IORESOURCE_BUSY, 0, U64_MAX, NULL, take_ram);
	if (ram_end <= ram_start)
		return -ENODEV;
	folder = debugfs_create_dir("outboard_hog", NULL);
	debugfs_create_file("run", 0600, folder, NULL, &run_fops);
	return 0;
}

static void __exit hog_exit(void)
{
	debugfs_remove_recursive(folder);
	if (owner)
		give();
}

module_init(hog_init);
module_exit(hog_exit);
MODULE_DESCRIPTION("Test of outboard_dma: takes the room for mappings away");
MODULE_LICENSE("GPL");
