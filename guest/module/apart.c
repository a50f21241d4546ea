// SPDX-License-Identifier: GPL-2.0
/*
 * Mappings beside the table of windows, at bus addresses of a given alignment. Nobody can ask a Mac for an address. But one that puts each mapping
 * behind the last can be led: what comes out wrong is kept for the moment, the gap up to the next multiple is filled, and the next try lies there.
 */
#include "odma.h"

#include "trace.h"

/* Of each mapping; and fillers. */
#define MOST_TRIES 6
#define MOST_HELD (4 * MOST_TRIES)

/* Has the host do one thing. A status of the protocol's. */
static u32 ask(struct odma_domain *domain, struct odma_apart *it, u32 op)
{
	unsigned long flags;
	u32 queue = odma_queue_take(domain, &flags), status;
	u8 *entry = domain->queues[queue];

	memset(entry, 0, ODMA_ENTRY_BYTES);
	*(__le32 *)(entry + ODMA_ENTRY_OP) = cpu_to_le32(op);
	*(__le64 *)(entry + ODMA_ENTRY_ADDRESS) = cpu_to_le64(it->address);
	*(__le64 *)(entry + ODMA_ENTRY_LEN) = cpu_to_le64(it->len);
	*(__le64 *)(entry + ODMA_ENTRY_HANDLE) = cpu_to_le64(it->handle);
	/* A batch that the host refuses whole leaves this. */
	*(__le32 *)(entry + ODMA_ENTRY_STATUS) = cpu_to_le32(ODMA_STATUS_BUSY);
	odma_ring(domain, queue, 1);
	status = le32_to_cpu(READ_ONCE(*(__le32 *)(entry + ODMA_ENTRY_STATUS)));
	if (status == ODMA_STATUS_OK && op == ODMA_OP_MAP) {
		it->handle = le64_to_cpu(*(__le64 *)(entry + ODMA_ENTRY_HANDLE));
		it->bus = le64_to_cpu(*(__le64 *)(entry + ODMA_ENTRY_BUS));
	}
	odma_queue_give(domain, queue, flags);
	return status;
}

static bool map(struct odma_client *client, struct odma_apart *it, bool may_sleep)
{
	unsigned int waits = 0;
	u32 status;

	do
		status = ask(client->domain, it, ODMA_OP_MAP);
	while (status == ODMA_STATUS_RETURNING && may_sleep && odma_wait(client, true, &waits));
	return status == ODMA_STATUS_OK;
}

/* Maps `size` bytes at `phys` so that the bus address is a multiple of `alignment`. Any context; false if it cannot be had. */
bool odma_map_apart(struct odma_client *client, phys_addr_t phys, size_t size, size_t alignment, bool may_sleep,
		    u64 *handle, u64 *bus)
{
	struct odma_apart held[MOST_HELD];
	unsigned int count = 0, tries;
	bool found = false;

	if (!IS_ALIGNED(phys, SZ_16K))
		return false;
	size = ALIGN(size, SZ_16K);
	for (tries = 0; tries < MOST_TRIES && count < MOST_HELD && !found; tries++) {
		struct odma_apart *it = &held[count];
		u64 gap;

		*it = (struct odma_apart){ .address = phys, .len = size };
		if (!map(client, it, may_sleep))
			break;
		if (IS_ALIGNED(it->bus, alignment)) {
			*handle = it->handle;
			*bus = it->bus;
			found = true;
			break;
		}
		count++;
		/* Of the same memory: no other is needed to take up room. */
		for (gap = ALIGN(it->bus + size, alignment) - (it->bus + size); gap && count < MOST_HELD;) {
			struct odma_apart *filler = &held[count];

			*filler = (struct odma_apart){ .address = phys, .len = min_t(u64, gap, size) };
			if (!map(client, filler, may_sleep))
				break;
			count++;
			gap -= filler->len;
		}
	}
	while (count)
		odma_unmap_apart(client, held[--count].handle);
	return found;
}

void odma_unmap_apart(struct odma_client *client, u64 handle)
{
	struct odma_apart it = { .handle = handle };

	if (ask(client->domain, &it, ODMA_OP_UNMAP) != ODMA_STATUS_OK)
		dev_warn_ratelimited(client->dev, "the host does not take a mapping for both sides down\n");
}
