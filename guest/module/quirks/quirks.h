/* SPDX-License-Identifier: GPL-2.0 */
#ifndef OUTBOARD_QUIRKS_H
#define OUTBOARD_QUIRKS_H

/* Looks for what needs a quirk and arms it. 0, or why the module cannot load. */
int outboard_quirks_init(void);
/* Undoes all of it. */
void outboard_quirks_exit(void);

#endif
