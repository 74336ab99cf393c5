//! Random histories of a key: time passes, messages are sealed, rings and materials change, things are revoked and
//! shredded, sweeps are applied in whole, in part, late and twice.

use std::collections::BTreeMap;

use envelope::EncryptionContext;
use proptest::prelude::*;

use super::*;
use crate::store::{EnvelopeWeight, Target};
use crate::tenant::KekRing;

/// A key, its data keys and its KEKs, as a registry and a KMS would keep them.
#[derive(Clone, Debug)]
struct World {
    tenant: TenantRecord,
    key: KeyRecord,
    deks: BTreeMap<[u8; 16], StoredDek>,
    materials: Materials,
    shreds: Vec<ShredRecord>,
    now: Timestamp,
    made: u128,
}

fn kek(n: u8) -> KekId {
    match n {
        // Two replicas of one multi-Region key among single ones.
        0 => "arn:aws:kms:eu-west-1:111122223333:key/mrk-1".parse().unwrap(),
        1 => "arn:aws:kms:us-east-1:111122223333:key/mrk-1".parse().unwrap(),
        n => format!("local:k{n}").parse().unwrap(),
    }
}

fn ring(keks: &[u8]) -> KekRing {
    let mut members: Vec<Kek> = Vec::new();
    for n in keks {
        if !members.iter().any(|member| member.id == kek(*n)) {
            members.push(Kek::direct(kek(*n)));
        }
    }
    KekRing::new(members).unwrap()
}

fn scope(n: u8) -> DekScope {
    let mut bound = EncryptionContext::new();
    if n > 0 {
        bound.insert("desk", n.to_string()).unwrap();
    }
    DekScope { tenant: "acme".parse().unwrap(), key: "default".parse().unwrap(), bound }
}

const POLICY: KeyPolicy = KeyPolicy {
    dek_age_secs_max: 86_400,
    dek_messages_max: 100,
    dek_bytes_max: 10_000,
    envelope: EnvelopeWeight::Embedded,
};

impl World {
    fn new() -> Self {
        let now = Timestamp::from_unix_ms(1_000_000_000);
        let tenant = TenantRecord {
            id: "acme".parse().unwrap(),
            status: Status::Enabled,
            ring: ring(&[2]),
            former_keks: vec![],
            created_at: now,
            updated_at: now,
            version: 1,
        };
        let key = KeyRecord {
            tenant: tenant.id.clone(),
            name: "default".parse().unwrap(),
            status: Status::Enabled,
            policy: POLICY,
            created_at: now,
            updated_at: now,
            version: 1,
        };
        let mut world = Self {
            tenant,
            key,
            deks: BTreeMap::new(),
            materials: Materials::new(),
            shreds: vec![],
            now,
            made: 1,
        };
        world.make(&scope(0), DekState::Active);
        world.make(&scope(1), DekState::Active);
        world
    }

    fn form(&self, kek: &KekId) -> WrappedRecord {
        WrappedRecord {
            kek: kek.clone(),
            blob: vec![1],
            // The last one's KMS does not tell which material wrapped something.
            material: self.materials.get(kek).filter(|_| *kek != self::kek(5)).map(|k| k.material.clone()),
            wrapped_at: self.now,
        }
    }

    /// As the pool makes them: one form for all replicas of a key.
    fn make(&mut self, scope: &DekScope, state: DekState) {
        self.made += 1;
        let id = DataKeyId::from_bytes(self.made.to_be_bytes());
        let mut wrapped: Vec<WrappedRecord> = Vec::new();
        for member in self.tenant.ring.members() {
            if !wrapped.iter().any(|form| form.kek.same_material(&member.id)) {
                wrapped.push(self.form(&member.id));
            }
        }
        let dek = DekRecord::new(id, scope.clone(), state, self.now);
        self.deks.insert(*id.as_bytes(), StoredDek { dek, wrapped });
    }

    fn of(&self, scope: &DekScope, state: DekState) -> Option<DataKeyId> {
        let found = self.deks.values().find(|d| d.dek.scope == *scope && d.dek.state == state);
        found.map(|stored| stored.dek.id)
    }

    fn plan(&self) -> Vec<Step> {
        let deks: Vec<StoredDek> = self.deks.values().cloned().collect();
        let view = View {
            tenant: &self.tenant,
            key: &self.key,
            deks: &deks,
            materials: &self.materials,
            shreds: &self.shreds,
        };
        sweep(&view, self.now)
    }

    fn dek(&mut self, id: DataKeyId) -> &mut StoredDek {
        self.deks.get_mut(id.as_bytes()).unwrap()
    }

    /// As the registry applies a step: refuses what the state no longer allows.
    fn apply(&mut self, step: &Step) {
        let now = self.now;
        match step {
            Step::Next { scope } => {
                if self.of(scope, DekState::Next).is_none() {
                    self.make(scope, DekState::Next);
                }
            }
            Step::RetireNext { dek } => {
                let stored = self.dek(*dek);
                if stored.dek.state == DekState::Next {
                    stored.dek.state = DekState::Retired;
                }
            }
            Step::Retire { scope, dek } => {
                let Some(next) = self.of(scope, DekState::Next) else { return };
                if self.of(scope, DekState::Active).is_some_and(|active| active != *dek) {
                    return;
                }
                if self.dek(*dek).dek.state == DekState::Active {
                    self.dek(*dek).dek.state = DekState::Retired;
                }
                let heir = &mut self.dek(next).dek;
                (heir.state, heir.activated_at) = (DekState::Active, Some(now));
            }
            Step::Rewrap { dek, kek } | Step::Add { dek, kek } => {
                let form = self.form(kek);
                let stored = self.dek(*dek);
                if stored.dek.state != DekState::Destroyed {
                    assert!(!stored.wrapped.is_empty(), "there is nothing to rewrap from");
                    stored.wrapped.retain(|other| other.kek != *kek);
                    stored.wrapped.push(form);
                }
            }
            Step::Drop { dek, kek } => {
                let stored = self.dek(*dek);
                if stored.wrapped.iter().any(|form| form.kek != *kek) {
                    stored.wrapped.retain(|form| form.kek != *kek);
                }
            }
            Step::Destroy { dek } => {
                let record = self.dek(*dek).dek.clone();
                if is_due(&self.shreds, &record, now) {
                    let stored = self.dek(*dek);
                    stored.dek.state = DekState::Destroyed;
                    stored.wrapped.clear();
                }
            }
        }
    }

    fn has_active(&self) -> Vec<DekScope> {
        let active = self.deks.values().filter(|stored| stored.dek.state == DekState::Active);
        active.map(|stored| stored.dek.scope.clone()).collect()
    }

    /// What holds at every moment, whoever does what in whatever order.
    fn check(&self, before: &Self) {
        for scope in before.has_active() {
            let shredded = before.shreds.iter().any(|shred| shred.due_at <= self.now);
            assert!(shredded || self.of(&scope, DekState::Active).is_some(), "a scope lost its data key");
        }
        for (id, stored) in &self.deks {
            let was = before.deks.get(id);
            if stored.dek.state == DekState::Destroyed {
                let wanted = was.is_some_and(|was| {
                    was.dek.state == DekState::Destroyed || is_due(&before.shreds, &was.dek, self.now)
                });
                assert!(wanted, "{id:?} was destroyed, and nobody asked for it");
                assert!(stored.wrapped.is_empty());
            } else {
                assert!(!stored.wrapped.is_empty(), "{id:?} cannot be opened by anybody");
            }
        }
    }
}

/// What happens between sweeps.
#[derive(Clone, Debug)]
enum Event {
    Wait(u64),
    Seal { scope: u8, messages: u64, bytes: u64 },
    Ring(Vec<u8>),
    Rotate(u8),
    Revoke(usize),
    ShredDek { at: usize, wait: u64 },
    ShredKey { wait: u64 },
    Cancel,
    Sweep,
    SweepInPart(usize),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (0_u64..200_000).prop_map(Event::Wait),
        4 => (0_u8..2, 0_u64..90, 0_u64..9_000)
            .prop_map(|(scope, messages, bytes)| Event::Seal { scope, messages, bytes }),
        2 => prop::collection::vec(0_u8..6, 1..5).prop_map(Event::Ring),
        2 => (0_u8..6).prop_map(Event::Rotate),
        1 => (0_usize..20).prop_map(Event::Revoke),
        1 => (0_usize..20, 0_u64..200_000).prop_map(|(at, wait)| Event::ShredDek { at, wait }),
        1 => (0_u64..400_000).prop_map(|wait| Event::ShredKey { wait }),
        1 => Just(Event::Cancel),
        3 => Just(Event::Sweep),
        2 => (0_usize..10).prop_map(Event::SweepInPart),
    ]
}

impl World {
    fn shred(&mut self, target: Target, wait: u64) {
        if self.shreds.iter().all(|shred| shred.target != target) {
            self.shreds.push(ShredRecord {
                tenant: self.tenant.id.clone(),
                target,
                requested_at: self.now,
                requested_by: "test".to_owned(),
                due_at: self.now.plus(Duration::from_secs(wait)),
                done_at: None,
            });
        }
    }

    fn nth(&self, at: usize) -> DataKeyId {
        self.deks.values().nth(at % self.deks.len()).unwrap().dek.id
    }

    fn happen(&mut self, event: &Event) {
        match event {
            Event::Wait(secs) => self.now = self.now.plus(Duration::from_secs(*secs)),
            Event::Seal { scope: n, messages, bytes } => {
                if let Some(id) = self.of(&scope(*n), DekState::Active) {
                    let now = self.now;
                    let dek = &mut self.dek(id).dek;
                    dek.messages += messages;
                    dek.bytes += bytes;
                    dek.last_sealed_at = Some(now);
                }
            }
            Event::Ring(keks) => {
                let ring = ring(keks);
                let known: Vec<Kek> =
                    self.tenant.ring.members().iter().chain(&self.tenant.former_keks).cloned().collect();
                self.tenant.former_keks.clear();
                for kek in known {
                    let former = &mut self.tenant.former_keks;
                    if ring.member(&kek.id).is_none() && !former.contains(&kek) {
                        former.push(kek);
                    }
                }
                self.tenant.ring = ring;
            }
            Event::Rotate(n) => {
                let since = self.now;
                let material = format!("m{}", since.unix_ms());
                // Replicas of a multi-Region key change together.
                for id in (0..6).map(kek).filter(|other| other.same_material(&kek(*n))) {
                    let seen = KekMaterial { kek: id.clone(), material: material.clone(), since };
                    self.materials.insert(id, seen);
                }
            }
            Event::Revoke(at) => {
                let id = self.nth(*at);
                let state = self.dek(id).dek.state;
                if state == DekState::Retired {
                    self.dek(id).dek.state = DekState::Revoked;
                }
            }
            Event::ShredDek { at, wait } => {
                let id = self.nth(*at);
                if self.dek(id).dek.state == DekState::Retired {
                    self.dek(id).dek.state = DekState::Revoked;
                    self.shred(Target::Dek(id), *wait);
                }
            }
            Event::ShredKey { wait } => {
                self.key.status = Status::Disabled;
                self.shred(Target::Key(self.key.name.clone()), *wait);
            }
            Event::Cancel => {
                let now = self.now;
                self.shreds.retain(|shred| shred.due_at <= now);
                if self.shreds.is_empty() {
                    self.key.status = Status::Enabled;
                }
            }
            Event::Sweep => self.plan().iter().for_each(|step| self.apply(step)),
            Event::SweepInPart(steps) => self.plan().iter().take(*steps).for_each(|step| self.apply(step)),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_nothing_is_lost_and_applied_steps_are_not_asked_for_again(
        events in prop::collection::vec(event(), 1..40)
    ) {
        let mut world = World::new();
        for event in &events {
            let before = world.clone();
            world.happen(event);
            world.check(&before);
        }
        let before = world.clone();
        for step in world.plan() {
            world.apply(&step);
        }
        world.check(&before);
        prop_assert_eq!(world.plan(), vec![], "a second sweep asks for more");
    }

    /// Another replica planned on the same state, or on an older one, and applies its steps late, in any interleaving.
    #[test]
    fn two_sweeps_of_different_replicas_do_no_harm_in_any_order(
        events in prop::collection::vec(event(), 1..25),
        later in prop::collection::vec(event(), 0..4),
        choices in prop::collection::vec(any::<bool>(), 0..200)
    ) {
        let mut world = World::new();
        for event in &events {
            world.happen(event);
        }
        let stale = world.plan();
        for event in &later {
            world.happen(event);
        }
        let fresh = world.plan();
        let (mut stale, mut fresh) = (stale.iter(), fresh.iter());
        for choice in choices.into_iter().chain([true; 400]).chain([false; 400]) {
            let step = if choice { stale.next() } else { fresh.next() };
            if let Some(step) = step {
                let before = world.clone();
                world.apply(step);
                world.check(&before);
            }
        }
        // Whatever came of it, the next sweeps put everything in order, and then there is nothing left to do.
        for _ in 0..2 {
            for step in world.plan() {
                world.apply(&step);
            }
        }
        prop_assert_eq!(world.plan(), vec![]);
        let ring = world.tenant.ring.clone();
        for stored in world.deks.values().filter(|stored| stored.dek.state != DekState::Destroyed) {
            for member in ring.members() {
                let served = stored.wrapped.iter().any(|form| form.kek.same_material(&member.id));
                prop_assert!(served, "{:?} has no form for {}", stored.dek.id, member.id);
            }
            for form in &stored.wrapped {
                prop_assert!(ring.member(&form.kek).is_some(), "{:?} still needs {}", stored.dek.id, form.kek);
            }
        }
    }
}

fn steps_of(world: &World, kind: fn(&Step) -> bool) -> usize {
    world.plan().into_iter().filter(kind).count()
}

#[test]
fn the_next_data_key_is_made_at_80_percent_of_any_limit_and_not_before() {
    let next = |step: &Step| matches!(step, Step::Next { .. });
    for (messages, bytes, age_secs, asked) in
        [(79, 7_999, 69_119, 0), (80, 0, 0, 1), (0, 8_000, 0, 1), (0, 0, 69_120, 1)]
    {
        let mut world = World::new();
        world.happen(&Event::Wait(age_secs));
        world.happen(&Event::Seal { scope: 0, messages, bytes });
        assert_eq!(steps_of(&world, next), asked, "{messages} messages, {bytes} bytes, {age_secs} s");
    }
}

#[test]
fn a_data_key_that_nobody_uses_is_left_alone_however_old() {
    let mut world = World::new();
    world.happen(&Event::Seal { scope: 0, messages: 1, bytes: 1 });
    world.happen(&Event::Wait(400 * 86_400));
    assert_eq!(world.plan(), vec![]);
}

#[test]
fn a_changed_ring_ends_the_active_data_key_before_it_is_rewrapped() {
    let mut world = World::new();
    world.happen(&Event::Ring(vec![3]));
    let plan = world.plan();
    let (one, two) = (scope(0), world.of(&scope(0), DekState::Active).unwrap());
    let at = |wanted: &Step| plan.iter().position(|step| step == wanted).unwrap();
    let next = at(&Step::Next { scope: one.clone() });
    let retire = at(&Step::Retire { scope: one, dek: two });
    let add = at(&Step::Add { dek: two, kek: kek(3) });
    let dropped = at(&Step::Drop { dek: two, kek: kek(2) });
    assert!(next < retire && retire < add && add < dropped, "{plan:?}");
}

#[test]
fn nothing_is_destroyed_a_moment_before_its_time() {
    let mut world = World::new();
    world.happen(&Event::ShredKey { wait: 3_600 });
    let destroy = |step: &Step| matches!(step, Step::Destroy { .. });
    world.now = world.now.plus(Duration::from_millis(3_599_999));
    assert_eq!(steps_of(&world, destroy), 0);
    world.now = world.now.plus(Duration::from_millis(1));
    assert_eq!(steps_of(&world, destroy), 2);
}

#[test]
fn a_form_of_a_kek_whose_material_is_not_known_is_left_as_it_is() {
    let mut world = World::new();
    let rewrap = |step: &Step| matches!(step, Step::Rewrap { .. });
    let known =
        |material: &str, since: Timestamp| KekMaterial { kek: kek(2), material: material.to_owned(), since };
    let ids: Vec<DataKeyId> = world.deks.values().map(|stored| stored.dek.id).collect();
    for material in [None, Some("1".to_owned())] {
        for id in &ids {
            world.dek(*id).wrapped[0].material.clone_from(&material);
        }
        // The KMS has never said what the KEK's material is: nothing to compare with.
        world.materials.clear();
        assert_eq!(world.plan(), vec![], "{material:?}");
        // Another KEK's material says nothing about this one's.
        world.materials.insert(kek(3), KekMaterial { kek: kek(3), ..known("2", world.now) });
        assert_eq!(world.plan(), vec![], "{material:?}");
    }
    // Once it says so, what is known to be of another material is wrapped anew.
    world.materials.insert(kek(2), known("1", world.now));
    assert_eq!(steps_of(&world, rewrap), 0);
    world.materials.insert(kek(2), known("2", world.now));
    assert_eq!(steps_of(&world, rewrap), 2);
    // A form that does not tell its material goes by its age: made in the moment of the change, it is new.
    for id in &ids {
        world.dek(*id).wrapped[0].material = None;
    }
    assert_eq!(steps_of(&world, rewrap), 0);
    world.materials.insert(kek(2), known("2", world.now.plus(Duration::from_millis(1))));
    assert_eq!(steps_of(&world, rewrap), 2);
}

/// Somebody else has added a KEK to the ring since this view was read.
#[test]
fn a_form_under_a_kek_that_is_not_known_at_all_is_not_dropped() {
    let mut world = World::new();
    let id = world.of(&scope(0), DekState::Active).unwrap();
    world.dek(id).dek.state = DekState::Retired;
    let newer = WrappedRecord { kek: kek(4), ..world.form(&kek(2)) };
    world.dek(id).wrapped.push(newer);
    assert_eq!(world.plan(), vec![]);
}
