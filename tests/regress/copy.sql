-- COPY in and out, in all formats, with errors in the middle; \copy.
CREATE TABLE c (id int PRIMARY KEY, t text, n numeric);
COPY c FROM STDIN;
1	one	1.5
2	tab\there	\N
3	pg_background_launch('SELECT 1')	3
\.
COPY c TO STDOUT;
COPY c (t, id) FROM STDIN WITH (FORMAT csv, HEADER, DELIMITER ';', NULL 'nil', QUOTE '"');
t;id
"semi;colon";10
"quote "" and
newline";11
nil;12
\.
COPY (SELECT * FROM c ORDER BY id) TO STDOUT WITH (FORMAT csv, HEADER, FORCE_QUOTE (t));
COPY (SELECT * FROM c ORDER BY id) TO STDOUT (DELIMITER '|', NULL '-');
COPY c FROM STDIN;
20	good	1
bad	row	2
\.
SELECT count(*) FROM c;
COPY c FROM STDIN;
21	too	few
22	x
\.
COPY c FROM STDIN;
23	too	1	many
\.
COPY c FROM STDIN;
1	duplicate	0
\.
COPY c FROM STDIN (FORMAT csv);
30,"unterminated,1
\.
COPY c FROM STDIN (FORMAT nothing);
COPY c (nothing) FROM STDIN;
COPY c TO '/nonexistent/file';
COPY c FROM STDIN WITH (FORMAT csv) WHERE id > 40;
40,no,1
41,yes,2
\.
SELECT id, t FROM c WHERE id >= 40;
BEGIN;
COPY c FROM STDIN;
50	in a transaction	5
\.
SELECT count(*) FROM c;
COPY c FROM STDIN;
x
\.
SELECT 1;
ROLLBACK;
COPY c FROM STDIN;
\.
COPY c FROM STDIN;
60	no end marker in this one but the next	6
61	ünïcödé 🐘	7
\.
COPY (SELECT t FROM c WHERE id > 59) TO STDOUT;
COPY (SELECT i, i % 7 FROM generate_series(1, 200) AS i) TO STDOUT;
COPY (SELECT 1 / (3 - i) FROM generate_series(1, 5) AS i) TO STDOUT;
COPY (INSERT INTO c VALUES (70, 'returned', 1) RETURNING *) TO STDOUT;
SELECT 1\; COPY (SELECT 2) TO STDOUT\; SELECT 3;
COPY c FROM STDIN\; SELECT count(*) FROM c;
80	two in one	1
\.
\copy c TO 'copied.txt'
CREATE TABLE d (LIKE c);
\copy d FROM 'copied.txt'
SELECT count(*), sum(id) FROM d;
\copy (SELECT id FROM d ORDER BY id LIMIT 3) TO STDOUT
\copy d FROM 'no_such_file.txt'
\copy d TO 'copied.bin' (FORMAT binary)
TRUNCATE d;
\copy d FROM 'copied.bin' (FORMAT binary)
SELECT count(*), sum(id) FROM d;
\copy d FROM 'copied.txt' (FORMAT binary)
\copy c FROM STDIN
90	by copy	1
\.
\copy nowhere FROM 'copied.txt'
COPY c FROM PROGRAM 'true';
TABLE c;
DROP TABLE c, d;
