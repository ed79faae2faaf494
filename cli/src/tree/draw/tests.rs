use super::*;

/// A line is `[stripe/]name state [< parent[,parent]] [lease ms] [rack r] [zone z] [weight n]`.
fn nodes(input: &str) -> Vec<v1::TreeNode> {
    let mut nodes: Vec<v1::TreeNode> = Vec::new();
    for line in input.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (stripe, host) = words[0].split_once('/').unwrap_or(("0", words[0]));
        let after = |word| words.iter().position(|&w| w == word).map(|at| words[at + 1]);
        let foreign = words[1] == "foreign";
        let stripe = stripe.parse().unwrap();
        let parents: Vec<String> =
            after("<").map_or(Vec::new(), |list| list.split(',').map(Into::into).collect());
        let above = nodes
            .iter()
            .filter(|node| node.stripe == stripe && parents.iter().any(|p| p == name(node)));
        nodes.push(v1::TreeNode {
            stripe,
            depth: above.map(|node| node.depth + 1).max().unwrap_or(0),
            host: if foreign { String::new() } else { host.into() },
            portal: if foreign {
                host.into()
            } else {
                "10.0.0.1:3260".into()
            },
            origin: foreign || words[1] == "origin",
            state: match words[1] {
                "pending" => v1::AttachState::Pending,
                _ => v1::AttachState::Ready,
            }
            .into(),
            connected: words[1] != "lost" && !foreign,
            parents,
            lease_left_ms: after("lease").map_or(0, |ms| ms.parse().unwrap()),
            rack: after("rack").unwrap_or_default().into(),
            zone: after("zone").unwrap_or_default().into(),
            weight: after("weight").map_or(1, |weight| weight.parse().unwrap()),
            ..Default::default()
        });
    }
    nodes
}

fn check_to(levels: Option<usize>, input: &str, expect: &str) {
    let margin = expect
        .lines()
        .nth(1)
        .map_or(0, |line| line.len() - line.trim_start().len());
    let expect: String = expect
        .lines()
        .skip(1)
        .filter(|line| !line.trim().is_empty())
        .map(|line| format!("{}\n", line.get(margin..).unwrap_or("")))
        .collect();
    let drawn = draw(&nodes(input), levels);
    assert_eq!(drawn, expect, "\n{drawn}");
}

fn check(input: &str, expect: &str) {
    check_to(None, input, expect);
}

#[test]
fn a_tree_is_drawn_with_its_states() {
    check(
        "origin origin
         host-1 ready < origin
         host-2 ready < origin
         host-10 pending < host-1
         host-3 lost < host-1 lease 2500
         host-4 ready < host-2",
        "
        5 hosts, 2 deep: 3 ready, 1 pending, 1 lost
        origin         origin   10.0.0.1:3260
        ├─ host-1      ready
        │  ├─ host-3   lost     lease ends in 2.50 s
        │  └─ host-10  pending
        └─ host-2      ready
           └─ host-4   ready
        ",
    );
}

#[test]
fn each_stripe_has_a_tree() {
    check(
        "0/o origin
         0/a ready < o
         1/o origin
         1/b ready < o
         1/a ready < b",
        "
        stripe 0: 1 host, 1 deep: 1 ready
        o     origin  10.0.0.1:3260
        └─ a  ready
        stripe 1: 2 hosts, 2 deep: 2 ready
        o        origin  10.0.0.1:3260
        └─ b     ready
           └─ a  ready
        ",
    );
}

#[test]
fn a_foreign_origin_goes_by_its_portal() {
    check(
        "[fd00::1]:3260 foreign
         a ready < [fd00::1]:3260",
        "
        1 host, 1 deep: 1 ready
        [fd00::1]:3260  origin
        └─ a            ready
        ",
    );
}

#[test]
fn several_parents_are_named_and_drawn_under_the_first() {
    check(
        "o origin
         a ready < o
         b ready < o
         c ready < a,b",
        "
        3 hosts, 2 deep: 3 ready
        o        origin  10.0.0.1:3260
        ├─ a     ready
        │  └─ c  ready   also under b
        └─ b     ready
        ",
    );
}

#[test]
fn what_no_origin_reaches_is_still_drawn_once_even_a_cycle() {
    check(
        "o origin
         child pending < gone-child
         gone-child ready < gone
         x ready < y
         y ready < x
         z ready < z",
        "
        5 hosts, 1 deep: 4 ready, 1 pending
        o           origin   10.0.0.1:3260
        not under any origin:
        gone-child  ready
        └─ child    pending
        z           ready
        x           ready
        └─ y        ready
        ",
    );
}

#[test]
fn nothing_attached_is_said() {
    check("", "\nno host is attached\n");
}

#[test]
fn racks_zones_and_weights_stand_in_their_column_and_an_arrow_where_a_stripe_comes_into_one() {
    check(
        "o origin rack r0
         a ready < o zone z rack r1 weight 3
         b ready < a zone z rack r1
         c pending < a zone z rack r2
         d ready < c zone z rack r2
         e ready < o",
        "
        5 hosts, 3 deep: 4 ready, 1 pending
        o           origin     10.0.0.1:3260, rack r0
        ├─ a        ready    → zone z, rack r1, weight 3
        │  ├─ b     ready      zone z, rack r1
        │  └─ c     pending  → zone z, rack r2
        │     └─ d  ready      zone z, rack r2
        └─ e        ready
        → over this host the stripe comes into its rack or zone
        ",
    );
}

#[test]
fn below_the_levels_that_were_asked_for_hosts_are_counted() {
    check_to(
        Some(1),
        "o origin
         a ready < o
         b ready < o
         c lost < a
         d ready < c
         e pending < d
         f ready < b",
        "
        6 hosts, 4 deep: 4 ready, 1 pending, 1 lost
        o     origin  10.0.0.1:3260
        ├─ a  ready
        │  └─ … 3 hosts below: 1 ready, 1 pending, 1 lost
        └─ b  ready
           └─ … 1 host below: 1 ready
        ",
    );
}

#[test]
fn two_hundred_hosts_in_racks_are_a_line_each_with_their_states_in_one_column() {
    let mut input = "o origin\n".to_owned();
    for number in 1..=200 {
        let parent = if number < 3 {
            "o".to_owned()
        } else {
            format!("host-{}", (number - 1) / 2)
        };
        let state = if number == 77 { "lost" } else { "ready" };
        input += &format!("host-{number} {state} < {parent} rack r{}\n", number % 8);
    }
    let drawn = draw(&nodes(&input), None);
    let lines: Vec<&str> = drawn.lines().collect();
    assert_eq!(
        (lines.len(), lines[0]),
        (203, "200 hosts, 7 deep: 199 ready, 1 lost")
    );
    let columns: BTreeSet<usize> = lines[2..202]
        .iter()
        .map(|line| line.chars().collect::<String>())
        .map(|line| {
            let at = line.find("ready").or_else(|| line.find("lost")).unwrap();
            line[..at].chars().count()
        })
        .collect();
    assert_eq!(columns.len(), 1, "{drawn}");
    assert!(lines.iter().all(|line| line.chars().count() <= 80), "{drawn}");
}
