/* SPDX-License-Identifier: GPL-2.0 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM outboard_dma

#if !defined(ODMA_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define ODMA_TRACE_H

#include <linux/device.h>
#include <linux/tracepoint.h>

/* Longest address of a PCI function, with its zero. */
#define ODMA_NAME_BYTES 16

TRACE_EVENT(odma_map,
	TP_PROTO(struct device *dev, u64 phys, u64 bus, u64 len, bool hit),
	TP_ARGS(dev, phys, bus, len, hit),
	TP_STRUCT__entry(
		__array(char, device, ODMA_NAME_BYTES)
		__field(u64, phys)
		__field(u64, bus)
		__field(u64, len)
		__field(bool, hit)
	),
	TP_fast_assign(
		strscpy(__entry->device, dev_name(dev), ODMA_NAME_BYTES);
		__entry->phys = phys;
		__entry->bus = bus;
		__entry->len = len;
		__entry->hit = hit;
	),
	TP_printk("%s phys_addr=%llx dma_addr=%llx size=%llu %s", __entry->device, __entry->phys,
		  __entry->bus, __entry->len, __entry->hit ? "hit" : "miss")
);

TRACE_EVENT(odma_unmap,
	TP_PROTO(struct device *dev, u64 bus, u64 len),
	TP_ARGS(dev, bus, len),
	TP_STRUCT__entry(
		__array(char, device, ODMA_NAME_BYTES)
		__field(u64, bus)
		__field(u64, len)
	),
	TP_fast_assign(
		strscpy(__entry->device, dev_name(dev), ODMA_NAME_BYTES);
		__entry->bus = bus;
		__entry->len = len;
	),
	TP_printk("%s dma_addr=%llx size=%llu", __entry->device, __entry->bus, __entry->len)
);

TRACE_EVENT(odma_map_sg,
	TP_PROTO(struct device *dev, int nents, int segments),
	TP_ARGS(dev, nents, segments),
	TP_STRUCT__entry(
		__array(char, device, ODMA_NAME_BYTES)
		__field(int, nents)
		__field(int, segments)
	),
	TP_fast_assign(
		strscpy(__entry->device, dev_name(dev), ODMA_NAME_BYTES);
		__entry->nents = nents;
		__entry->segments = segments;
	),
	TP_printk("%s nents=%d segments=%d", __entry->device, __entry->nents, __entry->segments)
);

TRACE_EVENT(odma_unmap_sg,
	TP_PROTO(struct device *dev, int nents),
	TP_ARGS(dev, nents),
	TP_STRUCT__entry(
		__array(char, device, ODMA_NAME_BYTES)
		__field(int, nents)
	),
	TP_fast_assign(
		strscpy(__entry->device, dev_name(dev), ODMA_NAME_BYTES);
		__entry->nents = nents;
	),
	TP_printk("%s nents=%d", __entry->device, __entry->nents)
);

TRACE_EVENT(odma_fail,
	TP_PROTO(struct device *dev, u64 phys, u64 len, int failure),
	TP_ARGS(dev, phys, len, failure),
	TP_STRUCT__entry(
		__array(char, device, ODMA_NAME_BYTES)
		__field(u64, phys)
		__field(u64, len)
		__field(int, failure)
	),
	TP_fast_assign(
		strscpy(__entry->device, dev_name(dev), ODMA_NAME_BYTES);
		__entry->phys = phys;
		__entry->len = len;
		__entry->failure = failure;
	),
	TP_printk("%s phys_addr=%llx size=%llu failure=%d", __entry->device, __entry->phys,
		  __entry->len, __entry->failure)
);

/* One exchange with the host: an exit. */
TRACE_EVENT(odma_ring,
	TP_PROTO(struct device *dev, u32 entries),
	TP_ARGS(dev, entries),
	TP_STRUCT__entry(
		__array(char, device, ODMA_NAME_BYTES)
		__field(u32, entries)
	),
	TP_fast_assign(
		strscpy(__entry->device, dev_name(dev), ODMA_NAME_BYTES);
		__entry->entries = entries;
	),
	TP_printk("%s entries=%u", __entry->device, __entry->entries)
);

#endif

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
