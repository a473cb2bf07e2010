-- Tables, columns, indexes, views, sequences, partitions, schemas, comments; psql's \d of them.
CREATE TABLE item (id serial PRIMARY KEY, name text NOT NULL DEFAULT 'thing', price numeric CHECK (price >= 0), tags text[]);
\d item
CREATE TABLE item (id int);
CREATE TABLE IF NOT EXISTS item (id int);
INSERT INTO item (price) VALUES (1.50), (2) RETURNING id, name;
ALTER TABLE item ADD COLUMN made date DEFAULT '2024-01-01', ADD COLUMN twice numeric GENERATED ALWAYS AS (price * 2) STORED;
SELECT * FROM item ORDER BY id;
UPDATE item SET twice = 5;
ALTER TABLE item ALTER COLUMN name TYPE varchar(3);
ALTER TABLE item ALTER COLUMN name TYPE varchar(10), ALTER COLUMN name DROP DEFAULT;
ALTER TABLE item RENAME COLUMN made TO created;
ALTER TABLE item DROP COLUMN nothing;
ALTER TABLE item DROP COLUMN IF EXISTS nothing;
CREATE INDEX item_name ON item (lower(name)) WHERE price > 1;
CREATE UNIQUE INDEX CONCURRENTLY item_price ON item (price);
CREATE INDEX item_name ON item (name);
\d item
COMMENT ON TABLE item IS 'things — with a dash';
COMMENT ON COLUMN item.price IS 'in €';
SELECT obj_description('item'::regclass), col_description('item'::regclass, 3);
CREATE VIEW dear AS SELECT id, name, price FROM item WHERE price > 1.6;
SELECT * FROM dear;
INSERT INTO dear (name, price) VALUES ('viewed', 9) RETURNING id;
SELECT pg_get_viewdef('dear'::regclass, true);
CREATE OR REPLACE VIEW dear AS SELECT id FROM item;
DROP TABLE item;
ALTER VIEW dear RENAME TO costly;
CREATE MATERIALIZED VIEW sums AS SELECT count(*), sum(price) FROM item WITH NO DATA;
SELECT * FROM sums;
REFRESH MATERIALIZED VIEW sums;
SELECT * FROM sums;
CREATE SEQUENCE steps START 10 INCREMENT 5 MAXVALUE 20 CACHE 1;
SELECT nextval('steps'), nextval('steps'), nextval('steps');
SELECT nextval('steps');
SELECT currval('steps'), lastval();
SELECT setval('steps', 12), nextval('steps');
ALTER SEQUENCE steps RESTART WITH 99;
CREATE TABLE auto (id int GENERATED ALWAYS AS IDENTITY (START 100), v int);
INSERT INTO auto VALUES (1, 1);
INSERT INTO auto OVERRIDING SYSTEM VALUE VALUES (1, 1);
INSERT INTO auto (v) VALUES (2) RETURNING *;
CREATE SCHEMA other;
CREATE TABLE other.item (x int);
SET search_path = other, public;
SELECT * FROM item;
SELECT current_schemas(false);
RESET search_path;
CREATE TABLE part (k int, v text) PARTITION BY RANGE (k);
CREATE TABLE part_1 PARTITION OF part FOR VALUES FROM (0) TO (10);
CREATE TABLE part_2 PARTITION OF part FOR VALUES FROM (10) TO (20) PARTITION BY LIST (v);
CREATE TABLE part_2_a PARTITION OF part_2 FOR VALUES IN ('a');
CREATE TABLE part_x PARTITION OF part FOR VALUES FROM (5) TO (15);
INSERT INTO part VALUES (1, 'x'), (11, 'a');
INSERT INTO part VALUES (11, 'b');
INSERT INTO part VALUES (99, 'b');
SELECT tableoid::regclass, * FROM part ORDER BY k;
UPDATE part SET k = 12, v = 'a' WHERE k = 1;
ALTER TABLE part DETACH PARTITION part_1;
\d+ part
CREATE TABLE child (extra int) INHERITS (part_1);
SELECT count(*) FROM ONLY part_1;
CREATE TABLE copy (LIKE item INCLUDING ALL);
CREATE TABLE made AS SELECT id, price FROM item WITH NO DATA;
SELECT price AS p, id INTO made2 FROM item;
SELECT * FROM made2 ORDER BY id;
TRUNCATE made2 RESTART IDENTITY;
CREATE TABLE bad (x nosuchtype);
CREATE TABLE bad (x int, x int);
CREATE TABLE "Mixed Case" ("Select" int, "ü" text);
INSERT INTO "Mixed Case" VALUES (1, 'ä');
SELECT "Select", "ü" FROM "Mixed Case";
SELECT * FROM mixed;
DROP TABLE nowhere;
DROP TABLE IF EXISTS nowhere;
\dt
\dv
\ds
\dn
DROP SCHEMA other;
DROP SCHEMA other CASCADE;
DROP TABLE item CASCADE;
CREATE STATISTICS st ON k, v FROM part;
VACUUM part_1;
ANALYZE part;
REINDEX TABLE auto;
CLUSTER auto;
