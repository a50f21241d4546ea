/* SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0 */
/* Written by crates/abi/tests/header.rs; change crates/abi/src and run UPDATE=1 cargo test -p outboard-abi. */
#ifndef OUTBOARD_DMA_H
#define OUTBOARD_DMA_H

/* PCI vendor of the device. Not assigned to anybody: provisional until the project has an id of its own. */
#define ODMA_PCI_VENDOR 0x1234u
/* PCI device id of the device. */
#define ODMA_PCI_DEVICE 0xbd0u
/* PCI class code: system peripheral, other. */
#define ODMA_PCI_CLASS 0x88000u
/* Bytes of BAR 0. */
#define ODMA_BAR_BYTES 0x1000u
/* R, 32 bits: MAGIC_VALUE. */
#define ODMA_MAGIC 0x0u
/* What MAGIC reads. */
#define ODMA_MAGIC_VALUE 0x414d444fu
/* R, 32 bits: protocol version, major in bits 31:16, minor in bits 15:0. Another major number is another protocol. */
#define ODMA_VERSION 0x4u
/* The version described here. */
#define ODMA_VERSION_VALUE 0x10000u
/* R, 32 bits: feature bits. Unknown ones are to be ignored. */
#define ODMA_FEATURES 0x8u
/* Feature: QUEUE_DOORBELL_LATER works. */
#define ODMA_FEATURE_LATER 0x1u
/* Feature: CONTROL_PANICKED is understood. */
#define ODMA_FEATURE_PANICKED 0x2u
/* R, 32 bits: the root port whose slot is served: device number in bits 7:3, function number in bits 2:0, on bus 0. */
#define ODMA_SERVED 0xcu
/* R, 64 bits: most bytes mapped at a time. */
#define ODMA_LIMIT_BYTES 0x10u
/* R, 32 bits: most mappings at a time. */
#define ODMA_LIMIT_ENTRIES 0x18u
/* R, 32 bits: addresses and lengths are multiples of this many bytes. */
#define ODMA_GRANULE 0x1cu
/* R, 32 bits: width of the bus addresses that come back. */
#define ODMA_ADDRESS_BITS 0x20u
/* R, 32 bits: number of queues, 2 to MAX_QUEUES: one for each vCPU, and one for what nobody waits for. */
#define ODMA_QUEUES 0x24u
/* Most queues there can be. */
#define ODMA_MAX_QUEUES 0x21u
/* R, 32 bits: most entries of a batch. */
#define ODMA_BATCH 0x28u
/* Entries of a batch that every device takes. */
#define ODMA_MAX_BATCH 0x100u
/* W, 32 bits: CONTROL_ENABLE, CONTROL_RESET or CONTROL_PANICKED; anything else is ignored. */
#define ODMA_CONTROL 0x30u
/* The guest asks for mappings from now on. Until then the served functions may not start DMA. */
#define ODMA_CONTROL_ENABLE 0x1u
/* Stops and resets the served functions, takes down every mapping and disables the device. Done when the store retires. The functions keep their BARs and memory decoding; bus master, interrupts and everything else are as after power-on. */
#define ODMA_CONTROL_RESET 0x2u
/* The guest's kernel has panicked. Changes nothing on the device: the host takes note of it. */
#define ODMA_CONTROL_PANICKED 0x3u
/* R, 32 bits: state of the device. */
#define ODMA_STATE 0x34u
/* Not enabled. */
#define ODMA_STATE_OFF 0x0u
/* Enabled. */
#define ODMA_STATE_ON 0x1u
/* The slot is empty, or its device has failed: mappings can only be taken down. A device that is added to the slot makes it STATE_OFF again, with limits of its own. */
#define ODMA_STATE_GONE 0x2u
/* R, 64 bits: bytes mapped now. */
#define ODMA_STAT_BYTES 0x80u
/* R, 64 bits: mappings now. */
#define ODMA_STAT_ENTRIES 0x88u
/* R, 64 bits: mappings made. */
#define ODMA_STAT_MAPS 0x90u
/* R, 64 bits: mappings taken down. */
#define ODMA_STAT_UNMAPS 0x98u
/* R, 64 bits: entries refused. */
#define ODMA_STAT_REFUSED 0xa0u
/* R, 64 bits: batches taken, of both kinds. */
#define ODMA_STAT_BATCHES 0xa8u
/* First queue's registers; queue n is n times QUEUE_STRIDE further. */
#define ODMA_QUEUE_FIRST 0x400u
/* Bytes of a queue's registers. */
#define ODMA_QUEUE_STRIDE 0x20u
/* RW, 64 bits (or two halves), in the queue: guest-physical address of its entries, a multiple of 64. */
#define ODMA_QUEUE_BASE 0x0u
/* W, 32 bits, in the queue: work through this many entries now. */
#define ODMA_QUEUE_DOORBELL 0x8u
/* W, 32 bits, in the queue: take down this many mappings when there is time. */
#define ODMA_QUEUE_DOORBELL_LATER 0xcu
/* R, 32 bits, in the queue: Status(crate::Status) of the last batch: the first that is not success. */
#define ODMA_QUEUE_STATUS 0x10u
/* R, 32 bits, in the queue: number of the last batch's entries that did not succeed. */
#define ODMA_QUEUE_FAILED 0x14u
/* Bytes of an entry. */
#define ODMA_ENTRY_BYTES 0x40u

/* In an entry, 32 bits: Op. */
#define ODMA_ENTRY_OP 0x0u
/* In an entry, 32 bits: 0. Other bits are refused. */
#define ODMA_ENTRY_FLAGS 0x4u
/* In an entry, 64 bits: guest-physical address to map. */
#define ODMA_ENTRY_ADDRESS 0x8u
/* In an entry, 64 bits: bytes to map. */
#define ODMA_ENTRY_LEN 0x10u
/* In an entry, 64 bits: name of a mapping. Written by the device for a mapping, by the guest for an unmapping. */
#define ODMA_ENTRY_HANDLE 0x18u
/* In an entry, 64 bits: bus address of the mapping's first byte, written by the device. */
#define ODMA_ENTRY_BUS 0x20u
/* In an entry, 32 bits: Status, written by the device. */
#define ODMA_ENTRY_STATUS 0x28u

/* Map len bytes at address. */
#define ODMA_OP_MAP 0x1u
/* Take down the mapping named handle, whole. */
#define ODMA_OP_UNMAP 0x2u

/* Done. */
#define ODMA_STATUS_OK 0x0u
/* Unknown operation, or bits that must be 0 are not. */
#define ODMA_STATUS_UNKNOWN 0x1u
/* Not (all) guest RAM, or the end leaves the address space. */
#define ODMA_STATUS_BAD_RANGE 0x2u
/* Address or length is no multiple of the granule, or the length is 0. */
#define ODMA_STATUS_MISALIGNED 0x3u
/* The limit of bytes is reached. */
#define ODMA_STATUS_OUT_OF_BYTES 0x4u
/* The limit of mappings is reached. */
#define ODMA_STATUS_OUT_OF_ENTRIES 0x5u
/* Enough is free, but not in one piece. */
#define ODMA_STATUS_FRAGMENTED 0x6u
/* Enough will be free once addresses that were unmapped are returned. */
#define ODMA_STATUS_RETURNING 0x7u
/* No mapping has this name. */
#define ODMA_STATUS_NO_SUCH_HANDLE 0x8u
/* The host refused for a reason of its own, which its log has. */
#define ODMA_STATUS_HOST 0x9u
/* The device is not enabled. */
#define ODMA_STATUS_OFF 0xau
/* The queue has a batch under way. */
#define ODMA_STATUS_BUSY 0xbu
/* The queue's base is not set, not aligned, or its entries are not (all) guest RAM. */
#define ODMA_STATUS_BAD_QUEUE 0xcu
/* A count of 0 or beyond the limit. */
#define ODMA_STATUS_BAD_COUNT 0xdu
/* The served device is gone. */
#define ODMA_STATUS_GONE 0xeu
/* A batch for later may only unmap. */
#define ODMA_STATUS_NOT_LATER 0xfu

/* PCI vendor. */
#define ODMA_PUBLISHED_PCI_VENDOR 0x1b36u
/* PCI device id. */
#define ODMA_PUBLISHED_PCI_DEVICE 0x15u
/* Bytes of BAR 0; 32-bit accesses only. */
#define ODMA_PUBLISHED_BAR_BYTES 0x1000u
/* R: PUBLISHED_VERSION_VALUE. */
#define ODMA_PUBLISHED_VERSION 0x0u
/* What it reads, in both layouts. */
#define ODMA_PUBLISHED_VERSION_VALUE 0x2u
/* R: bus number in bits 15:8, device and function number in bits 7:0 of the served function. */
#define ODMA_PUBLISHED_MANAGED_BDF 0x4u
/* R: most entries of a command. */
#define ODMA_PUBLISHED_MAX_ENTRIES 0x8u
/* What it reads. */
#define ODMA_PUBLISHED_MAX_ENTRIES_VALUE 0x1000u
/* R: result of the last doorbell. */
#define ODMA_PUBLISHED_STATUS 0xcu
/* W: guest-physical address of the command page, low half. */
#define ODMA_PUBLISHED_CMD_LO 0x10u
/* W: the same, high half. */
#define ODMA_PUBLISHED_CMD_HI 0x14u
/* W: any value runs the command. */
#define ODMA_PUBLISHED_DOORBELL 0x18u
/* Bytes of the command page: u32 type, u32 count, u32 status, u32 reserved, u64 requests, u64 responses. */
#define ODMA_PUBLISHED_CMD_BYTES 0x20u
/* In the command page: where the device writes the status. */
#define ODMA_PUBLISHED_CMD_STATUS 0x8u
/* Command: map. */
#define ODMA_PUBLISHED_MAP 0x1u
/* Command: unmap. */
#define ODMA_PUBLISHED_UNMAP 0x2u
/* Status: every entry succeeded. */
#define ODMA_PUBLISHED_OK 0x0u
/* Status: an entry failed. */
#define ODMA_PUBLISHED_IOERR 0x1u
/* Status: the command is malformed, no entry was touched. */
#define ODMA_PUBLISHED_INVAL 0x3u

#endif
