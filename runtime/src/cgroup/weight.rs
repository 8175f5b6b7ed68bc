//! cpu.shares of cgroup v1 as cpu.weight of v2.

/// The weight (1 to 10000) for `shares` (2 to 262144, clamped): 2 is 1, 1024 is 100, 262144 is 10000, on the curve that
/// the OCI runtimes share.
pub fn weight_of_shares(shares: u64) -> u64 {
    let exponent = (shares.clamp(2, 262_144) as f64).log2();
    let power = (exponent * exponent + 125.0 * exponent) / 612.0 - 7.0 / 34.0;
    (10f64.powf(power).ceil() as u64).clamp(1, 10_000)
}

#[cfg(test)]
mod tests {
    use super::weight_of_shares;

    #[test]
    fn the_curve_goes_through_its_three_fixed_points() {
        for (shares, weight) in
            [(0, 1), (2, 1), (100, 17), (512, 59), (1024, 100), (4096, 303), (262_144, 10_000), (u64::MAX, 10_000)]
        {
            assert_eq!(weight_of_shares(shares), weight, "{shares} shares");
        }
    }
}
