//! Times of log lines: RFC 3339 in UTC with nine digits of the second's fraction.

use std::time::{SystemTime, UNIX_EPOCH};

const SECONDS_OF_DAY: i64 = 86_400;

/// Nanoseconds since the epoch.
pub fn now_ns() -> i64 {
    // Not rustix's clock_gettime: it panics on a kernel whose vDSO lacks another function that it looks up beside this one.
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// `2026-11-24T02:03:04.000000005Z`. Years outside 0 to 9999 do not occur: i64 nanoseconds reach from 1677 to 2262.
pub fn rfc3339_nano(epoch_ns: i64) -> [u8; 30] {
    let seconds = epoch_ns.div_euclid(1_000_000_000);
    let (year, month, day) = civil_date(seconds.div_euclid(SECONDS_OF_DAY));
    let of_day = seconds.rem_euclid(SECONDS_OF_DAY);
    let mut text = *b"0000-00-00T00:00:00.000000000Z";
    let fields = [
        (0, 4, year),
        (5, 2, month),
        (8, 2, day),
        (11, 2, of_day / 3600),
        (14, 2, of_day / 60 % 60),
        (17, 2, of_day % 60),
        (20, 9, epoch_ns.rem_euclid(1_000_000_000)),
    ];
    for (start, width, value) in fields {
        let mut rest = value;
        for digit in text.iter_mut().skip(start).take(width).rev() {
            *digit = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
    }
    text
}

/// Year, month and day of a count of days since 1970-01-01 in the proleptic Gregorian calendar.
fn civil_date(days: i64) -> (i64, i64, i64) {
    // A count in eras of 400 years of which each starts on the first of March, so that the leap day is an era's last.
    let since_era_zero = days + 719_468;
    let era = since_era_zero.div_euclid(146_097);
    let day_of_era = since_era_zero.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(epoch_ns: i64) -> String {
        String::from_utf8(rfc3339_nano(epoch_ns).to_vec()).expect("ASCII")
    }

    #[test]
    fn known_times() {
        for (epoch_ns, expected) in [
            (0, "1970-01-01T00:00:00.000000000Z"),
            (-1, "1969-12-31T23:59:59.999999999Z"),
            (951_782_400_000_000_000, "2000-02-29T00:00:00.000000000Z"),
            (951_868_799_123_456_789, "2000-02-29T23:59:59.123456789Z"),
            (951_868_800_000_000_000, "2000-03-01T00:00:00.000000000Z"),
            (1_709_164_800_000_000_000, "2024-02-29T00:00:00.000000000Z"),
            (1_767_225_599_999_999_999, "2025-12-31T23:59:59.999999999Z"),
            (4_107_542_400_000_000_000, "2100-03-01T00:00:00.000000000Z"),
            (i64::MAX, "2262-04-11T23:47:16.854775807Z"),
            (i64::MIN, "1677-09-21T00:12:43.145224192Z"),
        ] {
            assert_eq!(text(epoch_ns), expected);
        }
    }

    /// Every day of 1677 to 2262 against a calendar that counts one day at a time.
    #[test]
    fn every_day_follows_the_one_before() {
        let leap = |year: i64| year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let (mut year, mut month, mut day) = (1970, 1, 1);
        for days in 0..200_000 {
            assert_eq!(civil_date(days), (year, month, day));
            let length = [31, if leap(year) { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31][month as usize - 1];
            day += 1;
            if day > length {
                (day, month) = (1, month + 1);
            }
            if month > 12 {
                (month, year) = (1, year + 1);
            }
        }
    }
}
