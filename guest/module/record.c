// SPDX-License-Identifier: GPL-2.0
/*
 * A recorder of DMA calls, in the form that `outboard fit` reads: writing N to the file records the next N entries (0 stops), reading
 * it gives lines `m MICROSECONDS ID ADDRESS:LENGTH,...` and `u MICROSECONDS ID`.
 */
#include "odma.h"

#include <linux/hash.h>
#include <linux/ktime.h>
#include <linux/rcupdate.h>
#include <linux/scatterlist.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#define MOST_ENTRIES (16u << 20)
#define BUCKET_BITS 16
#define NONE U32_MAX

enum kind { EMPTY, MAP, MORE, UNMAP };

struct entry {
	u64 at;		/* nanoseconds */
	u64 bus;	/* of the call's first entry; with its length and the number of entries it names the call */
	u64 phys;
	u64 len;
	u32 count;	/* entries of the call */
	u32 kind;	/* written last */
};

struct odma_record {
	u32 size;
	atomic_t next;	/* first entry not taken; beyond size: so many were lost */
	bool stopped;
	struct entry entries[];
};

/* Room for count entries, or NULL. */
static struct entry *take(struct odma_record *record, u32 count)
{
	u32 end;

	/* Far from overflow: nobody adds once it is beyond the size. */
	if (!record || READ_ONCE(record->stopped) || atomic_read(&record->next) >= record->size)
		return NULL;
	end = atomic_add_return(count, &record->next);
	return end <= record->size ? &record->entries[end - count] : NULL;
}

static void put(struct entry *entry, enum kind kind, u64 bus, u64 phys, u64 len, u32 count)
{
	entry->at = ktime_get_ns();
	entry->bus = bus;
	entry->phys = phys;
	entry->len = len;
	entry->count = count;
	smp_store_release(&entry->kind, kind);
}

void odma_record_map(struct odma_domain *domain, u64 bus, u64 phys, u64 len)
{
	struct entry *entry;

	rcu_read_lock();
	entry = take(READ_ONCE(domain->record), 1);
	if (entry)
		put(entry, MAP, bus, phys, len, 1);
	rcu_read_unlock();
}

/* Before the list's segments are merged: each entry still has its own bus address. */
void odma_record_map_sg(struct odma_domain *domain, struct scatterlist *first, int nents)
{
	struct scatterlist *sg;
	struct entry *entry;
	int i;

	rcu_read_lock();
	entry = take(READ_ONCE(domain->record), nents);
	if (entry) {
		for_each_sg(first, sg, nents, i)
			put(&entry[i], i ? MORE : MAP, sg_dma_address(first), sg_phys(sg), sg->length, nents);
	}
	rcu_read_unlock();
}

void odma_record_unmap(struct odma_domain *domain, u64 bus, u64 len, u32 count)
{
	struct entry *entry;

	rcu_read_lock();
	entry = take(READ_ONCE(domain->record), 1);
	if (entry)
		put(entry, UNMAP, bus, 0, len, count);
	rcu_read_unlock();
}

static DEFINE_MUTEX(record_mutex);

static void replace(struct odma_domain *domain, struct odma_record *record)
{
	struct odma_record *old = domain->record;

	WRITE_ONCE(domain->record, record);
	synchronize_rcu();
	vfree(old);
}

void odma_record_free(struct odma_domain *domain)
{
	replace(domain, NULL);
}

static ssize_t record_write(struct file *file, const char __user *text, size_t len, loff_t *pos)
{
	struct odma_domain *domain = file_inode(file)->i_private;
	struct odma_record *record;
	u32 size;
	int error = kstrtou32_from_user(text, len, 0, &size);

	if (error)
		return error;
	if (size > MOST_ENTRIES)
		return -EINVAL;
	mutex_lock(&record_mutex);
	if (size) {
		record = vzalloc(struct_size(record, entries, size));
		error = record ? 0 : -ENOMEM;
		if (record) {
			record->size = size;
			replace(domain, record);
		}
	} else if (domain->record) {
		WRITE_ONCE(domain->record->stopped, true);
	}
	mutex_unlock(&record_mutex);
	return error ? error : len;
}

/* What a reader works on: its own copy, with each unmapping's mapping found. */
struct view {
	u32 count;
	u32 lost;
	u32 *match;		/* for each UNMAP the index of its MAP, or NONE */
	struct entry *entries;
};

static u32 bucket(const struct entry *e)
{
	return hash_64(e->bus ^ (e->len << 20) ^ ((u64)e->count << 50), BUCKET_BITS);
}

/* The youngest live mapping of the same name is the one that goes: all of one name are alike. */
static int find_matches(struct view *view)
{
	u32 *heads = vmalloc(sizeof(*heads) << BUCKET_BITS);
	u32 i;

	if (!heads)
		return -ENOMEM;
	memset(heads, 0xff, sizeof(*heads) << BUCKET_BITS);
	for (i = 0; i < view->count; i++) {
		struct entry *e = &view->entries[i];
		u32 *link = &heads[bucket(e)];

		if (e->kind == MAP) {
			/* While a mapping is live, its place in match is the next of its bucket. */
			view->match[i] = *link;
			*link = i;
		} else if (e->kind == UNMAP) {
			while (*link != NONE) {
				struct entry *m = &view->entries[*link];

				if (m->bus == e->bus && m->len == e->len && m->count == e->count)
					break;
				link = &view->match[*link];
			}
			view->match[i] = *link;
			if (*link != NONE)
				*link = view->match[*link];
		}
	}
	vfree(heads);
	return 0;
}

static void free_view(struct view *view)
{
	vfree(view->match);
	vfree(view->entries);
	kfree(view);
}

static struct view *new_view(struct odma_record *record)
{
	struct view *view = kzalloc(sizeof(*view), GFP_KERNEL);
	u32 next = record ? atomic_read(&record->next) : 0;

	if (!view)
		return NULL;
	view->count = record ? min(next, record->size) : 0;
	view->lost = next - view->count;
	if (!view->count)
		return view;
	view->entries = vmalloc(array_size(view->count, sizeof(*view->entries)));
	view->match = vmalloc(array_size(view->count, sizeof(*view->match)));
	if (!view->entries || !view->match) {
		free_view(view);
		return NULL;
	}
	for (next = 0; next < view->count; next++) {
		/* Not written yet: it ends the view. */
		if (!smp_load_acquire(&record->entries[next].kind))
			break;
		view->entries[next] = record->entries[next];
	}
	view->count = next;
	if (find_matches(view)) {
		free_view(view);
		return NULL;
	}
	return view;
}

static void *record_start(struct seq_file *file, loff_t *pos)
{
	struct view *view = file->private;

	if (*pos == 0 && view->lost)
		seq_puts(file, "# the recorder was full: later calls are missing\n");
	return *pos < view->count ? &view->entries[*pos] : NULL;
}

static void *record_next(struct seq_file *file, void *v, loff_t *pos)
{
	struct view *view = file->private;

	++*pos;
	return *pos < view->count ? &view->entries[*pos] : NULL;
}

static void record_stop(struct seq_file *file, void *v)
{
}

static int record_show(struct seq_file *file, void *v)
{
	struct view *view = file->private;
	struct entry *e = v;
	u32 index = e - view->entries, last;

	/* A line ends behind the last entry of its call. */
	last = index + 1 == view->count || view->entries[index + 1].kind != MORE;
	switch (e->kind) {
	case MAP:
		seq_printf(file, "m %llu %u %llx:%llx%s", div_u64(e->at, 1000), index, e->phys, e->len,
			   last ? "\n" : "");
		break;
	case MORE:
		seq_printf(file, ",%llx:%llx%s", e->phys, e->len, last ? "\n" : "");
		break;
	case UNMAP:
		if (view->match[index] != NONE)
			seq_printf(file, "u %llu %u\n", div_u64(e->at, 1000), view->match[index]);
		break;
	}
	return 0;
}

static const struct seq_operations record_sops = {
	.start = record_start,
	.next = record_next,
	.stop = record_stop,
	.show = record_show,
};

static int record_open(struct inode *inode, struct file *file)
{
	struct odma_domain *domain = inode->i_private;
	struct view *view;
	int error;

	if (!(file->f_mode & FMODE_READ))
		return 0;
	mutex_lock(&record_mutex);
	view = new_view(domain->record);
	mutex_unlock(&record_mutex);
	if (!view)
		return -ENOMEM;
	error = seq_open(file, &record_sops);
	if (error)
		free_view(view);
	else
		((struct seq_file *)file->private_data)->private = view;
	return error;
}

static int record_release(struct inode *inode, struct file *file)
{
	if (!(file->f_mode & FMODE_READ))
		return 0;
	free_view(((struct seq_file *)file->private_data)->private);
	return seq_release(inode, file);
}

/* A file that is only written has no reader behind it. */
static loff_t record_llseek(struct file *file, loff_t offset, int whence)
{
	return file->f_mode & FMODE_READ ? seq_lseek(file, offset, whence) : -ESPIPE;
}

const struct file_operations odma_record_fops = {
	.owner = THIS_MODULE,
	.open = record_open,
	.release = record_release,
	.read = seq_read,
	.llseek = record_llseek,
	.write = record_write,
};
