/* SPDX-License-Identifier: GPL-2.0 */
#ifndef OUTBOARD_BENCH_H
#define OUTBOARD_BENCH_H

#include <linux/device.h>

/* Runs a command (see stress.c) and writes what it measured; -ENOENT if it is none of these. */
int bench_command(struct device *dev, const char *text, char *report, size_t size);

#endif
