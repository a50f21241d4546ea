//! Functions that Linux hands over through VFIO: group, container, type 1 IOMMU.
//!
//! Needs Linux 5.11 or newer (unmapping all at once). Of the kernel's interface it uses: `/dev/vfio/vfio`, `/dev/vfio/GROUP`, the device
//! files behind it, and the function's `config` file in sysfs, which shows the hardware's registers where VFIO shows its own
//! shadow (vendor and device ID, BARs).

mod domain;
mod function;
mod interrupts;
mod mapping;
mod region;
mod reset;
mod sys;

pub use crate::DmaPolicy;
pub use domain::VfioDomain;
pub use function::VfioFunction;
